"""From text to tokens.

encoder     TextEncoder: what a task calls
reference   `tokenizers`, which decides
gigatoken   a faster encoder, where it gives the same
tokenizer   training one
template    a chat as text
chats       a chat as tokens, and what of it is to be learned
chatfiles   the template that a tokenizer comes with
evaluations evaluations as tokens, to keep them out
"""

__all__: list[str] = []

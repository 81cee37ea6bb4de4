"""From text to tokens.

encoder     TextEncoder: what a task calls
reference   `tokenizers`, which decides
fast        faster encoders, where they give the same
tokenizer   training one, by BPE
unigram     or as a unigram model
template    a chat as text
chats       a chat as tokens, and what of it is to be learned
chatfiles   the template that a tokenizer comes with
evaluations evaluations as tokens, to keep them out
"""

__all__: list[str] = []

"""From text to tokens.

encoder     TextEncoder: what a task calls
reference   `tokenizers`, which decides
gigatoken   a faster encoder, where it gives the same
tokenizer   training one
"""

__all__: list[str] = []

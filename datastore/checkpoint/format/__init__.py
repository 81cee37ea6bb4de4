"""The documents of a run on disk.

manifest   the documents, their keys, and chunks of pieces
checks     documents that make sense, and agree with one another
layout     which rank's document has which box
tree       state without its tensors: plain values as JSON
wrapped    tensors that are made of others, as dicts of them
"""

__all__: list[str] = []

"""How data comes in: plan -> read -> filter -> tokenize -> shard -> write -> commit.

Pure stages over batches of documents; only the edges (`sources`, `streams`, `journal`, `executor`) touch anything.
"""

__all__: list[str] = []

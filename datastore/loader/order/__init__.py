"""The order of samples: pure functions, see docs/order.md.

order     from a position to a sample, from a cursor to batches
lanes     lanes and windows
samples   where samples begin in shards
packs     whole documents side by side in rows of one length
mix       the arithmetic of hashing, frozen
ahead      where lanes read on: which blocks come next, and when each is needed again
"""

__all__: list[str] = []

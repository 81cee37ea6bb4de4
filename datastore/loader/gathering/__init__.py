"""The reads of batches, and the copy into them.

gather   rows that are one stretch of a shard, or a few
packed   rows of whole documents: several pieces each
"""

__all__: list[str] = []

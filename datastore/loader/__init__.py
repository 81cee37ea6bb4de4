"""Which samples come when, and how they get into memory; see docs/order.md.

loader     Loader: an iterator of batches
rows       the same for rows of any schema: RowLoader
lookup     samples by their position in the order
settings   what a user may choose, and the rank that reads
batch      one batch
order      from a position to a sample: pure functions
mixture    several datasets as one, each by its weight
place      where a loader stands, and what comes next; the state
stream     a dataset or a mixture as samples, deletions taken into account
pipeline   what lies ahead: planned, fetched, made
assemble   a planned batch made
gathering  what a batch reads, and the copy into it
cache      blocks: mapped, kept in memory and on disk, fetched ahead
trace      from a batch back to documents
forecast   a run of the loader without data: requests, bytes, stalls
"""

__all__: list[str] = []

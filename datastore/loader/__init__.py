"""Which samples come when, and how they get into memory; see docs/order.md.

loader     Loader: an iterator of batches
rows       the same for rows of any schema: RowLoader
lookup     samples by their position in the order
settings   what a user may choose, and the rank that reads
batch      one batch
order      from a position to a sample: pure functions
mixture    several datasets as one, each by its weight
sources    one dataset or those of a mixture, and the order that a state gives them
position   where a loader stands, and what comes next
stream     a dataset or a mixture as samples, deletions taken into account
assemble   a planned batch made
packed     the reads of packed rows, and what lies beside their tokens
gather     what a batch reads, and the copy into it
cache      blocks: mapped, kept in memory and on disk, fetched ahead
state      the position, saved and loaded
trace      from a batch back to documents
"""

__all__: list[str] = []

"""How data comes in: plan, read, filter, tokenize, shard, write, commit.

ingest        prepare, run, commit
preparation   what can be known, and refused, before anything is written
outcome       the commit, or why there is none
settings      what a user may choose
reading       from files to documents
quality       which texts are worth it: filters, personal data, near duplicates
plan          tasks: a pure function of the listing and the settings
destination   the dataset an ingest adds to
tasks         one task: read, encode, store
encoding      from text to tokens
sinks         documents into shards
running       tasks, in this process, in others, or on an engine
writers       rows and tokens from a program of one's own
importing     datasets of other libraries
estimate      the cost, without doing it
report        how far it is, what it did, and what it has rejected
"""

__all__: list[str] = []

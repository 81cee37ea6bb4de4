"""A dataset: a URL with a log of versions.

snapshot     Dataset, one version, immutable; `open_dataset`
elsewhere    a dataset in other processes
roots        a dataset on several disks
journal      what an ingest has planned and done
journals     the journals of all ingests: damage, and what a purge takes out
diff         what changed between two versions
card         what a version is made of, for people
log          versions: their documents, the log, names for them
shards       what a version is made of
query        a dataset as other libraries see it
operations   each makes one commit
durability   damage: found, survived, repaired
"""

__all__: list[str] = []

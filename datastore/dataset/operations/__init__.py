"""The changes of a dataset: each makes one commit.

transaction   what all share: open, build, check that nobody interfered, publish
append        shards become visible
selection     which documents are meant
delete        documents leave the version
undelete      and come back
purge         deleted documents leave the disk, with a certificate
compact       small shards become large ones
merging       what some of them become, here or in other processes
evolve        columns of records are added, dropped, renamed
expire        old versions can be read no more
vacuum        files that no version names are removed
copy          the same dataset in another place
clone         a new dataset from a version
"""

__all__: list[str] = []

"""Blocks of shards, checked before they are handed out.

blocks     their numbering, and the contract
opening    from a dataset to its blocks
files      files of this machine
memory     what is fetched from elsewhere, within a budget
region     one shard: its blocks brought and checked
disk       blocks kept on a disk that ranks share
batches    batches of records on that disk
warm       that disk, filled ahead
folder     the files on that disk, and who may write
prefetch   what is fetched ahead, and what is given up
"""

__all__: list[str] = []

"""Blocks of shards, checked before they are handed out.

blocks     their numbering, and the contract
files      files of this machine
memory     what is fetched from elsewhere, within a budget
prefetch   what is fetched ahead, and what is given up
"""

__all__: list[str] = []

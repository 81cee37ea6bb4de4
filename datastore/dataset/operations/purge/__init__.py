"""Deleted documents leave the disk.

purge   blank, commit, finish: what a caller calls
plan    the plan, the certificate, and what is left over
blank   a shard with some rows blank
"""

__all__: list[str] = []

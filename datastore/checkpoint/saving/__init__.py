"""A save, in the order in which it happens.

saver      one save on one rank, and what it promises
snapshot   what it will hold, fixed at the moment of the call
write      the part of this rank
commit     one file that makes the step visible
"""

__all__: list[str] = []

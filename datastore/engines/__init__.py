"""Work in other processes, on this machine or on many: ingests, and whatever else goes through a whole dataset.

engine   what an engine is, and how work is given to one
local    processes of this machine
ray      a Ray cluster
"""

__all__: list[str] = []

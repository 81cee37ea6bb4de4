"""The place in the order that a loader stands at, whatever it reads.

position   where it stands, and what comes next
sources    one dataset or those of a mixture, and the order that a state gives them
state      a position, saved and loaded
"""

__all__: list[str] = []

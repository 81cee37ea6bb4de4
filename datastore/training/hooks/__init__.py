"""Other code in the life of a model.

adapt        small matrices learn beside frozen weights
base         the points where a hook may act
calibration  rows of the run, always the same, and what linear layers read
prune        weights become zero
quantize     weights become small integers
quantizing   how they do
"""

__all__: list[str] = []

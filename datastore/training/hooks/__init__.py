"""Other code in the life of a model.

base       the points where a hook may act
prune      weights become zero
quantize   weights become small integers
"""

__all__: list[str] = []

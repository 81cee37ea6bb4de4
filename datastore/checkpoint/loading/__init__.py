"""A load, in the order in which it happens.

restore   the newest sound step, and what all ranks agree on
reader    every chunk verified, then copied
sources   where saved bytes come from
targets   what they are copied into
shared    tensors that share memory
"""

__all__: list[str] = []

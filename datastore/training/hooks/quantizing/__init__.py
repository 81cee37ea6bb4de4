"""Weights as small integers: how they are found, stored and trained with.

settings    which layers, how many bits
grid        real weights to integers and back
layers      modules whose weight is stored packed, and the packing
holding     what files can hold of it
rounding    modules that round in every forward pass, and learn all the same
calibrated  GPTQ and AWQ: rounding that looks at the inputs
budget      how many bits each layer gets, where the size is given
"""

__all__: list[str] = []

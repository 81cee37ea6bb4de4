"""Gradients in fewer bytes.

codecs      rows of numbers as bytes and back: bfloat16, blocks of 8 or 4 bits, the largest values
feedback    a mean over ranks in a codec; what a message leaves out goes with the next one
lowrank     a mean of matrices as products of two thin ones: PowerSGD
attach      the place in DistributedDataParallel and in FSDP2 where a mean is taken
"""

__all__: list[str] = []

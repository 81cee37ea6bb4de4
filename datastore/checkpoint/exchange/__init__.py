"""Checkpoints of others: their calls into our format, their files in, ours out.

dcp     the storage behind `torch.distributed.checkpoint`, to write and to read
paths   state as that library flattens it
"""

__all__: list[str] = []

"""Checkpoints of others: their calls into our format, their files in, ours out.

dcp     the storage behind `torch.distributed.checkpoint`, to write and to read
files   files of torch.save, safetensors and DCP, read and written
orbax   folders of Orbax, read
paths   state as that library flattens it
"""

__all__: list[str] = []

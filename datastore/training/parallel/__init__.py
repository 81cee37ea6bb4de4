"""How the ranks of a run share the work.

layout      which sizes go together, and the place of a rank; loads no torch
ranks       the process group: joining, leaving, agreeing
context     every rank has some of the tokens of each sequence
lesson      what a rank learns from some rows: outputs and loss
strategy    the contract: a model distributed, stepped, measured, saved
whole       every rank has the whole model: one process, or DistributedDataParallel
servers     the same, but some ranks own the parameters: a parameter server
rounds      the same, but every rank learns by itself for some steps: DiLoCo
elsewhere   tensors of other ranks, as a checkpoint sees them
sharded     every rank has a part of each parameter: FSDP2, HSDP, tensor parallel and both
pipeline    every rank has some of the layers
passes      the memory of a step, found without taking it
norm        the norm of gradients that lie on several ranks
sync        gradients in fewer bytes
building    model, hooks and optimizer before the first step, in the one order that works
choose      the strategy of a layout
"""

__all__: list[str] = []

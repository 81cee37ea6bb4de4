"""A trainer on top of the loader and the checkpoints.

start         train and resume: here, on several ranks, under torchrun; loads no torch
session       one rank's part in a run, from joining to leaving
trainer       Trainer: built in one order, then stepped
supervisor    between steps: record, measure, evaluate, save
settings      what a run can be told
machine       what "auto" becomes here
parallel      how the ranks share the work
launcher      ranks on this machine: started, watched, ended
models, objectives, optim    what learns, what is learned, and how
hooks         other code in the life of a model
validation    the loss on what is held back
metrics       numbers about a run
run           the folder of a run, its data, its record, its audit
export        a model out of a run, and in use
"""

__all__: list[str] = []

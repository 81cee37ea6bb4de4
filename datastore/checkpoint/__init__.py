"""Training state that is there whole or not at all: saved in parts, committed by one file, verified before it is loaded.

checkpointer   Checkpointer: what a training program calls
exchange       checkpoints of others: torch.distributed.checkpoint with a run of ours behind it
saving         a save: snapshot, write, commit
loading        a load: sources, reader, targets, restore
places         two places behind one Checkpointer, and steps in the memory of ranks
replica        a run in a second place
difference     two steps held against each other
dropping       items dropped from old steps
inspect        look at a run without torch
keeping        which steps are kept, and the removal of all else
steps          the steps of a run
ranks          the ranks that save together: who, how they wait, how they agree
items          something with state, its name and its skeleton
tensors        tensors as bytes, and boxes of a whole
codec          parts packed for a place that is far or dear
format         the documents on disk
"""

__all__: list[str] = []

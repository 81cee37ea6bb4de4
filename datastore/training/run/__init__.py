"""The folder of a run.

folder   its documents: settings, sessions
changes  which settings may change when a run is resumed
lock     one writer at a time
data     which versions are read
split    what is trained on, and what is held back
feed     what the trainer asks of a loader of tokens or of records
architecture   the model, ours or one of transformers
record   what each step consumed
audit    trace: what a step consumed
proof    prove: that each sample came once
profile  where the time of some steps goes, and a trace of them
history  what runs have done: summaries, differences, pictures
"""

__all__: list[str] = []

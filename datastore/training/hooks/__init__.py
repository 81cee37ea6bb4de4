"""Other code in the life of a model.

base         the points where a hook may act
calibration  rows of the run, always the same, and what linear layers read
parts        tensors of which a rank has a part
masks        which weights are kept, by their scores
surgeon      weights that make up for those that are pruned
prune        weights become zero
shrink       a run begins with a part of another model
cuts         a GPT with fewer layers, channels or heads
share        layers have one matrix, and small differences
distill      a trained model teaches
ema          the average of the weights is exported
quantize     weights become small integers
adapt        small matrices learn beside frozen weights
bottleneck   adapters that are not linear
quantizing   how weights become small integers
"""

__all__: list[str] = []

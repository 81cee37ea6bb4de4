"""A model out of a run.

export        restored, passed through the hooks, written
huggingface   the folder that transformers opens
quantized     what its config says about quantized layers
initial       weights to begin with: those of another run or folder
inference     generate and evaluate
teaching      what a model expects after each token, beside the token
"""

__all__: list[str] = []

"""A model out of a run.

export        restored, passed through the hooks, written
huggingface   the folder that transformers opens
initial       weights to begin with: those of another run or folder
inference     generate and evaluate
"""

__all__: list[str] = []

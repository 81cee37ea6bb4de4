"""A model out of a run.

export        restored, passed through the hooks, written
huggingface   the folder that transformers opens
inference     generate and evaluate
"""

__all__: list[str] = []

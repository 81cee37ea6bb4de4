"""A model out of a run.

export        restored, passed through the hooks, written
huggingface   the folder that transformers opens
averaging     the mean of some steps
report        sizes, rates and losses side by side
quantized     what its config says about quantized layers
initial       weights to begin with: those of another run or folder
inference     generate and evaluate
llama_cpp     the file that llama.cpp opens
others        a run for llama.cpp and peft
teaching      what a model expects after each token, beside the token
"""

__all__: list[str] = []

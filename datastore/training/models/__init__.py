"""The models.

cache         keys and values of the tokens seen so far
float8        linear layers that multiply in fp8, by torchao
gpt           a GPT to read, its modules named as in Llama
heads         the GPT with another end, and small nets for clicks and pictures
huggingface   any model of transformers, made of its config
"""

__all__: list[str] = []

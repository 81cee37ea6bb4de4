"""Limits of the files that others open: asked before training, and once more before anything is written.

A Hugging Face folder holds everything in compressed-tensors' format `pack-quantized`, and `transformers` opens it, with one exception:
zero points and embeddings are read only if real weights are made of all layers at once. It then takes the first group's scheme for all
of them, and leaves inputs as they are.

A GGUF file has blocks of 32 columns with a scale of 16 bits: Q8_0, Q4_0, and with a zero point Q4_1. It holds what is quantized in groups
of whole blocks, embeddings too; three bits lie in four there. Inputs are llama.cpp's business.
"""

from collections.abc import Collection, Mapping

from torch import nn

from datastore.errors import ConfigError
from datastore.training.hooks.quantizing.layers import Packed, PackedEmbedding
from datastore.training.hooks.quantizing.settings import Scheme

__all__ = ["GGUF_BLOCK", "is_table", "needs_real_weights", "refuse_for_folder", "refuse_for_gguf"]

GGUF_BLOCK = 32
"""Columns of a block."""


def is_table(layer: nn.Module) -> bool:
    """Whether it is an embedding, real or packed."""
    return isinstance(layer, nn.Embedding | PackedEmbedding)


def needs_real_weights(layers: Mapping[str, nn.Module], schemes: Mapping[str, Scheme]) -> bool:
    """Whether `transformers` opens these layers as real weights only."""
    return any(not scheme.symmetric or is_table(layers[name]) for name, scheme in schemes.items())


def refuse_for_folder(
    layers: Mapping[str, nn.Module], schemes: Mapping[str, Scheme], *, kinds: Collection[Scheme]
) -> None:
    """Refuse schemes that a Hugging Face folder cannot hold; `kinds` are all that there are or can be.

    Raises:
        ConfigError: it cannot.
    """
    inputs = any(one.activations for one in schemes.values())
    if needs_real_weights(layers, schemes) and (len(kinds) > 1 or inputs):
        raise ConfigError(
            "transformers opens zero points and quantized embeddings only if all layers are alike, and inputs are left alone",
            kinds_of_layers=len(kinds),
            activations=8 if inputs else 0,
            hint="Use symmetric = true and no embedding, or leave out target_size and activations.",
        )


def refuse_for_gguf(layers: Mapping[str, nn.Linear | nn.Embedding | Packed], kinds: Collection[Scheme]) -> None:
    """Refuse schemes that a GGUF file cannot hold.

    Raises:
        ConfigError: it cannot.
    """
    for scheme in kinds:
        if scheme.group % GGUF_BLOCK or scheme.activations or (scheme.bits == 8 and not scheme.symmetric):
            raise ConfigError(
                "a GGUF file cannot hold such layers",
                bits=scheme.bits,
                group=scheme.group,
                symmetric=scheme.symmetric,
                activations=scheme.activations,
                hint="Use a group of 32 columns or none, symmetric = true for 8 bits, and activations = 0.",
            )
    for name, layer in layers.items():
        columns = int(layer.weight_shape[1]) if isinstance(layer, Packed) else layer.weight.shape[1]
        if columns % GGUF_BLOCK:
            raise ConfigError(
                "the columns of a layer are no whole blocks of a GGUF file",
                layer=name,
                columns=columns,
                block=GGUF_BLOCK,
                hint="Choose widths of the model that 32 divides, or another format.",
            )

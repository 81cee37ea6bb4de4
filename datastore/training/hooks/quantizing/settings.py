"""Settings of a quantization: which layers, how many bits, and how the integers are found."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, cast

import msgspec
from torch import Tensor, nn

from datastore.document import Count, Document, Positive, SettingsDocument
from datastore.errors import ConfigError

__all__ = ["Bits", "QuantizeSettings", "Scheme", "check_group", "chosen_layers", "matrices_of"]

Bits = Literal[3, 4, 8]


class Scheme(Document, frozen=True, kw_only=True):
    """The integers of one layer, as the settings have them."""

    bits: Bits = 8
    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    symmetric: bool = True
    activations: Literal[0, 8] = 0


class QuantizeSettings(SettingsDocument, frozen=True, kw_only=True):
    """How small the weights of linear layers become. Embeddings, norms and the output layer stay as they are, unless named."""

    bits: Bits = 8
    """Of each weight."""

    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Columns that share a scale; 0: all columns of a row."""

    symmetric: bool = True
    """Whether zero is in the middle of the integers; if not, each group has a zero point of its own."""

    activations: Literal[0, 8] = 0
    """Bits of the inputs of linear layers, with a scale for each token; 0: they stay as they are."""

    layers: tuple[str, ...] = ("*",)
    """Patterns of the names of the layers. An embedding or the output layer (lm_head) must be named in full."""

    method: Literal["rtn", "gptq", "awq"] = "rtn"
    """How the integers are found: round to nearest, or by what the layers read on rows of the run's data."""

    samples: Positive = 128
    """Rows of the data that gptq, awq and target_size look at."""

    target_size: Count = 0
    """Bytes that the quantized layers may take; each layer gets 8, 4 or 3 bits for it, `bits` at most. 0: all have `bits`."""

    file: Literal["hf", "gguf"] = "hf"
    """Where the export will go; what such a file cannot hold is refused before training."""

    qat_from: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Step from which on training rounds as the export does; left out: training does not notice."""

    scales: Literal["minmax", "learned"] = "minmax"
    """In training: each scale fits its group's weights, or is that times a factor that is learned."""

    @property
    def scheme(self) -> Scheme:
        """What every layer gets, unless a budget says otherwise."""
        return Scheme(bits=self.bits, group=self.group, symmetric=self.symmetric, activations=self.activations)


def matrices_of(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Return every linear layer and embedding of `model` by name, also those that training rounds.

    Of an adapted one it is the base. Where a layer becomes an ordinary one only as the model leaves training, because its base is small
    integers or it is a sum, it is one of that shape without numbers.
    """
    found: dict[str, nn.Linear | nn.Embedding] = {}
    for name, one in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(one, nn.Linear | nn.Embedding) and ".lora_" not in name:
            found[plain] = one
        elif plain != name or hasattr(one, "folded"):
            shape = one.weight_shape if hasattr(one, "weight_shape") else cast("Tensor", one.weight).shape
            out, columns = (int(size) for size in cast("Tensor", shape))
            found[plain] = nn.Linear(columns, out, bias=False, device="meta")
    return found


def chosen_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the layers that `patterns` name; "*" means every linear layer but the output layer.

    Raises:
        ConfigError: a pattern names none.
    """
    found: dict[str, nn.Linear | nn.Embedding] = {}
    matrices = matrices_of(model)
    for pattern in patterns:
        plain = {name for name, one in matrices.items() if isinstance(one, nn.Linear) and name != "lm_head"}
        named = [name for name in matrices if name == pattern or (name in plain and fnmatchcase(name, pattern))]
        if not named:
            raise ConfigError(
                "no layer has such a name",
                pattern=pattern,
                layers=[*matrices][:8],
                hint="Correct the layers that the hook names.",
            )
        found |= {name: matrices[name] for name in named}
    return found


def check_group(columns: int, group: int, **where: str) -> None:
    """Refuse groups that do not divide the columns.

    Raises:
        ConfigError: they do not.
    """
    if group and columns % group:
        raise ConfigError(
            "columns do not divide into groups", **where, columns=columns, group=group, hint="Choose another group."
        )

"""Weight-only quantization as the model leaves training: 8 or 4 bits, symmetric, one scale per row or per group of columns.

A quantized layer holds what the compressed-tensors format `pack-quantized` stores, under its names, so that an export is a
copy here too, and `transformers` and vLLM open it. Forward unpacks: it is there to measure the loss, not to be fast.

    weight_packed  int32 [out, ceil(in * bits / 32)]   value + 2^(bits - 1), little end first, rows padded with zero bits
    weight_scale   float32 [out, 1] or [out, in / group]
    weight_shape   int64 [2]

Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import Document, SettingsDocument
from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, RunState

__all__ = ["PackedLinear", "Quantize", "QuantizeSettings", "pack", "quantization_config", "quantize_rows", "unpack"]

Bits = Literal[4, 8]


class QuantizeSettings(SettingsDocument, frozen=True, kw_only=True):
    """How small the weights of linear layers become. Embeddings, norms and the output layer stay as they are."""

    bits: Bits = 8
    """Of each weight."""

    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Columns that share a scale; 0: all columns of a row."""


def quantize_rows(weight: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Return `weight` [out, in] as integers (int8 [out, in]) and scales (float32 [out, in / group or 1]).

    The largest magnitude of each group becomes the largest integer, so the error is at most half a scale.

    Raises:
        ConfigError: the columns cannot be divided into groups.
    """
    out, columns = weight.shape
    size = group or columns
    _check_group(columns, group)
    top = (1 << (bits - 1)) - 1
    parts = weight.detach().float().view(out, columns // size, size)
    scales = parts.abs().amax(dim=-1, keepdim=True) / top
    scales = torch.where(scales == 0, 1.0, scales)
    whole = torch.round(parts / scales).clamp(-top, top).to(torch.int8)
    return whole.view(out, columns), scales.squeeze(-1)


def _check_group(columns: int, group: int, **where: str) -> None:
    if group and columns % group:
        raise ConfigError(
            "columns do not divide into groups", **where, columns=columns, group=group, hint="Choose another group."
        )


def pack(whole: Tensor, bits: int) -> Tensor:
    """Return int8 [out, in] of `bits` bits each as int32 [out, words]."""
    per_word = 32 // bits
    padded = functional.pad(whole.to(torch.int32) + (1 << (bits - 1)), (0, -whole.shape[1] % per_word))
    shifts = torch.arange(per_word, device=whole.device, dtype=torch.int32) * bits
    # The sum of disjoint bits is their union; int32 wraps, as it should.
    words: Tensor = (padded.view(whole.shape[0], -1, per_word) << shifts).sum(dim=-1, dtype=torch.int32)
    return words


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return what `pack` was given, int8 [out, columns]."""
    shifts = torch.arange(32 // bits, device=packed.device, dtype=torch.int32) * bits
    values: Tensor = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (values.view(packed.shape[0], -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


class PackedLinear(nn.Module):
    """A linear layer without bias whose weight is stored packed."""

    def __init__(self, shape: tuple[int, int], settings: QuantizeSettings) -> None:
        super().__init__()
        out, columns = shape
        self.settings = settings
        self.weight_packed: Tensor
        self.weight_scale: Tensor
        self.weight_shape: Tensor
        words = -(-columns * settings.bits // 32)
        groups = columns // (settings.group or columns)
        self.register_buffer("weight_packed", torch.zeros(out, words, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(out, groups))
        self.register_buffer("weight_shape", torch.tensor([out, columns]))

    @staticmethod
    def of(linear: nn.Linear, settings: QuantizeSettings) -> "PackedLinear":
        """Return `linear`, quantized."""
        packed = PackedLinear((linear.out_features, linear.in_features), settings)
        whole, scales = quantize_rows(linear.weight, bits=settings.bits, group=settings.group)
        packed.weight_packed, packed.weight_scale = pack(whole, settings.bits), scales
        return packed

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float32 [out, in]."""
        out, columns = (int(size) for size in self.weight_shape)
        whole = unpack(self.weight_packed, self.settings.bits, columns)
        parts = whole.float().view(out, self.weight_scale.shape[1], -1) * self.weight_scale.unsqueeze(-1)
        return parts.view(out, columns)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the transposed weight."""
        return functional.linear(x, self.weight)


class Quantize(Hook):
    """Quantizes every linear layer within the decoder's layers on export; training does not notice."""

    Settings: ClassVar[type[Document]] = QuantizeSettings
    trains: ClassVar[bool] = False
    changes: ClassVar[Any] = "bits"

    def __init__(self, settings: QuantizeSettings) -> None:
        super().__init__(settings)
        self._settings = settings

    @override
    def start(self, run: RunState) -> None:
        """Refuse now what could not be exported when all the training is done."""
        for name, linear in _linears(run.model):
            _check_group(linear.in_features, self._settings.group, layer=name)

    @override
    def export(self, model: nn.Module) -> nn.Module:
        if not _linears(model):
            raise ConfigError(
                "no linear layer is left to quantize", bits=self._settings.bits, hint="Let one hook alone quantize."
            )
        replace_linears(model, lambda linear: PackedLinear.of(linear, self._settings))
        return model


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return every linear layer of `model` but the output layer."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(linear)` in the place of every linear layer of `model` but the output layer."""
    for name, linear in _linears(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(linear))


def quantization_config(settings: QuantizeSettings) -> dict[str, Any]:
    """Return the `quantization_config` of a Hugging Face config.json for these settings."""
    weights = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if settings.group else "channel",
        "group_size": settings.group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }

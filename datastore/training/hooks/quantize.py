"""Weights become small integers as the model leaves training: 8, 4 or 3 bits, with one scale per row or per group of columns.

Round to nearest needs nothing else. GPTQ, AWQ and a size to be reached look at rows of the run's data, in the moment of the export.
With `qat_from` training rounds, too, from that step on: the integers of an export are those that the last step computed with.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from datastore.document import Document
from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.hooks.bottleneck import refuse_unmerged
from datastore.training.hooks.calibration import Calibration, grams
from datastore.training.hooks.quantizing.budget import chosen_bits, ladder, refuse_small_budget, sensitivities
from datastore.training.hooks.quantizing.calibrated import balance_channels, moved_errors, searched_grid
from datastore.training.hooks.quantizing.holding import refuse_for_folder, refuse_for_gguf
from datastore.training.hooks.quantizing.layers import Packed, blank_packed, packed_layer, replace_module
from datastore.training.hooks.quantizing.rounding import Rounded, plain_layer, rounded_layer, stretch_of
from datastore.training.hooks.quantizing.settings import (
    QuantizeSettings,
    Scheme,
    check_group,
    chosen_layers,
    matrices_of,
)
from datastore.training.models.gpt import Block

__all__ = ["Quantize"]

Layers = Mapping[str, nn.Linear | nn.Embedding]


class Quantize(Hook):
    """Quantizes the chosen layers on export, and in training if told so."""

    Settings: ClassVar[type[Document]] = QuantizeSettings
    trains: ClassVar[bool] = False
    changes: ClassVar[Any] = "bits"

    def __init__(self, settings: QuantizeSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._rounded: list[Rounded] = []
        self._run: RunState | None = None
        self._adapted_first: bool | None = None
        """Whether the model that this hook was given had adapters; None: it was given none."""

    @classmethod
    @override
    def takes_part(cls, settings: Document) -> bool:
        assert isinstance(settings, QuantizeSettings)
        return settings.qat_from is not None

    @classmethod
    @override
    def layouts(cls, settings: Document) -> frozenset[str]:
        return frozenset({"shard", "context"})  # Rounding needs whole rows.

    @override
    def model(self, model: nn.Module) -> nn.Module:
        settings = self._settings
        layers = chosen_layers(model, settings.layers)
        self._refuse(model, layers)
        self._adapted_first = _has_adapters(model)
        if settings.qat_from is not None:
            if self._adapted_first:
                raise ConfigError("adapters change what training has rounded", hint="Leave out qat_from, or adapt.")
            if any(hasattr(one, "folded") for one in model.modules()):
                raise ConfigError("sums are folded after training has rounded", hint="Leave out qat_from, or share.")
            for name, layer in layers.items():
                learned = settings.scales == "learned"
                replace_module(model, name, rounded_layer(layer, settings.scheme, learned=learned))
        return model

    @override
    def start(self, run: RunState) -> None:
        """Refuse now what could not be exported when all the training is done."""
        settings = self._settings
        self._run = run
        if self._adapted_first is False and _has_adapters(run.model):
            raise ConfigError("adapters are merged after the weights are quantized", hint="Put adapt before quantize.")
        if run.calibration is not None and _looks(settings):
            run.calibration.require(settings.samples)
        if settings.qat_from is None:
            return
        self._rounded = [one for one in run.model.modules() if isinstance(one, Rounded)]
        if settings.qat_from >= run.steps:
            raise ConfigError("rounding begins after the last step", qat_from=settings.qat_from, steps=run.steps)
        self._set(active=settings.qat_from <= run.step)

    @override
    def updated(self, run: RunState) -> None:
        if self._settings.qat_from is not None:
            self._set(active=self._settings.qat_from <= run.step)

    @override
    def metrics(self) -> dict[str, float]:
        active = any(one.active for one in self._rounded)
        return {"weight_bits": float(self._settings.bits) if active else 32.0} if self._rounded else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"active": any(one.active for one in self._rounded)} if self._rounded else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._rounded:
            self._set(active=bool(state["active"]))
        else:
            super().load_state_dict(state)

    @override
    def export(self, model: nn.Module) -> nn.Module:
        settings = self._settings
        layers = chosen_layers(model, settings.layers)
        self._refuse(model, layers)
        if settings.qat_from is None:
            packed = self._found(model, layers)
        else:
            packed = {name: packed_layer(one, settings.scheme, stretch_of(one)) for name, one in layers.items()}
        for name, layer in matrices_of(model).items():
            replacement = packed.get(name, plain_layer(layer) if isinstance(layer, Rounded) else layer)
            if replacement is not layer:
                replace_module(model, name, replacement)
        return model

    def _set(self, *, active: bool) -> None:
        for layer in self._rounded:
            layer.active = active

    def _refuse(self, model: nn.Module, layers: Layers) -> None:
        settings = self._settings
        refuse_unmerged(model)
        for name, layer in layers.items():
            check_group(layer.weight.shape[1], settings.group, layer=name)
        if settings.target_size:
            refuse_small_budget(_shapes(layers), settings.scheme, target=settings.target_size)
        _refuse_training_with(settings)
        kinds = ladder(settings.scheme) if settings.target_size else [settings.scheme]
        if settings.file == "gguf":
            refuse_for_gguf(layers, kinds)
        else:
            refuse_for_folder(layers, dict.fromkeys(layers, settings.scheme), kinds=kinds)
        if settings.method == "awq" and not any(isinstance(one, Block) for one in model.modules()):
            raise ConfigError(
                "awq knows what comes before a layer in our GPT only", model=type(model).__name__, hint="Use gptq."
            )

    def _found(self, model: nn.Module, layers: Layers) -> dict[str, Packed]:
        """Return the quantized layers of a trained model."""
        settings = self._settings
        schemes = dict.fromkeys(layers, settings.scheme)
        if not _looks(settings):
            return {name: packed_layer(layer, settings.scheme) for name, layer in layers.items()}
        calibration = None if self._run is None else self._run.calibration
        if calibration is None:
            raise ConfigError(
                "there is no data to look at",
                method=settings.method,
                target_size=settings.target_size,
                hint='Use method = "rtn" without a target_size, or a run whose dataset is there.',
            )
        if settings.target_size:
            costs = sensitivities(model, layers, settings.scheme, calibration, settings.samples)
            schemes = chosen_bits(costs, _shapes(layers), settings.scheme, target=settings.target_size)
        if settings.method == "rtn":
            return {name: packed_layer(layer, schemes[name]) for name, layer in layers.items()}
        return self._looked_at(model, schemes, calibration)

    @torch.no_grad()
    def _looked_at(
        self, model: nn.Module, schemes: Mapping[str, Scheme], calibration: Calibration
    ) -> dict[str, Packed]:
        layers, count = chosen_layers(model, self._settings.layers), self._settings.samples
        linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        products = grams(model, linears, calibration, count=count)
        if self._settings.method == "awq":
            balance_channels(model, products, schemes)
            products = grams(model, linears, calibration, count=count)
        found = {}
        for name, layer in layers.items():
            packed = blank_packed(layer, schemes[name])
            if name not in products:  # An embedding, which reads numbers, or a layer that no row reaches.
                found[name] = packed_layer(layer, schemes[name])
                continue
            if self._settings.method == "gptq":
                packed.take(*moved_errors(layer.weight, products[name], schemes[name]))
            else:
                grid = searched_grid(layer.weight, schemes[name], products[name])
                packed.take(grid.whole(layer.weight), grid)
            found[name] = packed
        return found


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(one, "base_layer") for one in model.modules())


def _looks(settings: QuantizeSettings) -> bool:
    """Whether the data have a say in it."""
    return settings.method != "rtn" or settings.target_size > 0


def _refuse_training_with(settings: QuantizeSettings) -> None:
    """Refuse settings that cannot go together.

    Raises:
        ConfigError: they cannot.
    """
    if settings.qat_from is not None and _looks(settings):
        raise ConfigError(
            "training rounds to nearest, with the same bits in every layer",
            qat_from=settings.qat_from,
            method=settings.method,
            target_size=settings.target_size,
            hint="Leave out method and target_size, or qat_from.",
        )
    if settings.qat_from is None and settings.scales == "learned":
        raise ConfigError("scales are learned in training only", scales="learned", hint="Set qat_from.")


def _shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    return {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers.items()}

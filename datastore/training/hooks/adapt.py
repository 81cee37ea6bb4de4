"""Adapters: the weights that are there are frozen, and small matrices beside them learn; peft makes them, and others read them.

    lora      a product of two thin matrices is added to each chosen layer
    dora      the same, and the length of each row is learned by itself
    adalora   the ranks of all layers share a budget, and those that matter least are cut, along a cubic, in the middle 60 % of the run
    bottleneck   two thin layers behind attention and the feed-forward part, and a nonlinearity between them: `bottleneck.py`

A run with `model.init = "runs/base@8000"` adapts that model. Its checkpoints name the frozen weights, and store them once. An export
merges the adapters into the weights, unless they are not linear; `--as adapter` writes them alone, in a folder of peft.

adalora begins as lora does: B is zero, A as there, and each singular value 1. peft begins with singular values of zero between two small factors, which
learn next to nothing for the first tenth of a short run; and it divides by the ranks at the beginning, not by those at the end. Both
together cost 0.02 and 0.03 nats in 120 steps (two seeds).

The base can be small integers (`base_bits`): they are unpacked in each forward pass, and the adapters learn around their errors.

Sources: E. Hu et al., arXiv:2106.09685 (LoRA); S. Liu et al., arXiv:2402.09353 (DoRA); Q. Zhang et al., arXiv:2303.10512 (AdaLoRA);
T. Dettmers et al., arXiv:2305.14314 (a quantized base). `AdaLoraModel` of peft 0.21 for the order of events in a step.
"""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, cast

import msgspec
import torch
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document, Positive, SettingsDocument
from datastore.errors import ConfigError, DependencyError, ResumeError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.hooks.bottleneck import (
    BOTTLENECK,
    Bottleneck,
    add_bottlenecks,
    bottleneck_table,
    ends_of_parts,
)
from datastore.training.hooks.quantizing.layers import packed_layer, replace_module
from datastore.training.hooks.quantizing.settings import Scheme, check_group, chosen_layers
from datastore.training.objectives.base import MicroBatch

__all__ = ["Adapt", "AdaptSettings"]

_NAME = "default"
"""Of the adapter, as peft has it."""

_GROUP = 32
"""Columns of the base that share a scale."""


class AdaptSettings(SettingsDocument, frozen=True, kw_only=True):
    """Which layers are adapted, and how."""

    method: Literal["lora", "dora", "adalora", "bottleneck"] = "lora"
    """How the adapters look."""

    rank: Positive = 8
    """Of each product of two matrices; with adalora the mean over layers in the end, which begins half as high again; of a bottleneck
    the channels in it."""

    alpha: Annotated[float, msgspec.Meta(gt=0)] = 16.0
    """The product counts alpha / rank times; a bottleneck has no such factor."""

    layers: tuple[str, ...] = ("*",)
    """Patterns of the names of the linear layers; of those the ones behind which a bottleneck can be are o_proj and down_proj."""

    base_bits: Literal[0, 3, 4, 8] = 0
    """Of the frozen weights of these layers, in groups of 32 columns; 0: they stay as they are."""

    every: Positive = 10
    """Steps between new ranks, with adalora."""

    orthogonal: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    """Weight of the term that keeps the factors orthogonal, with adalora."""

    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of the adapters' first weights."""


class Adapt(Hook):
    """Trains adapters alone. Invariant: a rank that was cut is zero after `updated`, until a later cut lets it grow again."""

    Settings: ClassVar[type[Document]] = AdaptSettings
    reads_outputs: ClassVar[bool] = False
    changes: ClassVar[Any] = "weights"

    def __init__(self, settings: AdaptSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._tuner: Any = None
        self._layers: list[str] = []
        self._allocator: Any = None
        self._state: dict[str, dict[str, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    @classmethod
    @override
    def layouts(cls, settings: Document) -> frozenset[str]:
        assert isinstance(settings, AdaptSettings)
        # adalora compares whole matrices.
        return frozenset({"context"} if settings.method == "adalora" else {"shard", "context"})

    @override
    def model(self, model: nn.Module) -> nn.Module:
        settings = self._settings
        self._layers = self._chosen(model)
        for parameter in model.parameters():
            parameter.requires_grad = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            if settings.method == "bottleneck":
                add_bottlenecks(model, self._table)
            else:
                self._tuner = _injected(model, self._layers, settings)
        if settings.base_bits:
            scheme = Scheme(bits=cast("Any", settings.base_bits), group=_GROUP)
            for name in self._layers:
                base = cast("nn.Linear", model.get_submodule(f"{name}.base_layer"))
                replace_module(model, f"{name}.base_layer", packed_layer(base, scheme))
        return model

    def _chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt."""
        settings = self._settings
        layers = chosen_layers(model, settings.layers)
        others = [name for name in layers if not isinstance(model.get_submodule(name), nn.Linear)]
        if others:
            raise ConfigError(
                "only linear layers are adapted", layers=others, hint="Let the hook's layers name linear ones."
            )
        if settings.base_bits and settings.method == "dora":
            raise ConfigError(
                "dora needs the lengths of real rows", base_bits=settings.base_bits, hint="Use lora, or base_bits = 0."
            )
        chosen = ends_of_parts(layers) if settings.method == "bottleneck" else [*layers]
        for name in chosen:
            check_group(layers[name].weight.shape[1], _GROUP if settings.base_bits else 0, layer=name)
        return chosen

    @override
    def start(self, run: RunState) -> None:
        if self._settings.method != "adalora":
            return
        trained = self._trained(run.model)
        self._allocator = self._tuner.rankallocator
        config = self._allocator.peft_config
        config.total_step, config.tinit, config.tfinal = run.steps, run.steps // 10, run.steps * 3 // 10
        self._state = {
            kind: {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
            for kind in ("mean", "spread")
        }
        self._state["kept"] = {
            name: torch.ones(len(one), dtype=torch.bool, device=run.device)
            for name, one in trained.items()
            if ".lora_E." in name
        }

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        if self._allocator is None or not torch.is_grad_enabled():
            return loss
        terms = []
        for name, parameter in self._trained(self._tuner.model).items():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                terms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        return loss + self._settings.orthogonal * torch.stack(terms).mean()

    @override
    def gradients(self, run: RunState) -> None:
        if self._allocator is not None:
            found = {name: one.grad for name, one in self._trained(run.model).items()}
            self._gradients = {name: one.clone() for name, one in found.items() if one is not None}

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        if self._allocator is None:
            return
        config, trained = self._allocator.peft_config, self._trained(run.model)
        last = config.total_step - config.tfinal
        if run.step <= last:
            self._weigh(trained)
        budget, planned = self._allocator.budget_schedule(run.step)
        if run.step <= last and (planned or run.step == last) and budget < self._allocator.init_bgt:
            self._cut(trained, budget)
        elif run.step > last and self._rank() > self._allocator.target_bgt:
            self._cut(trained, self._allocator.target_bgt)  # The run was to be longer.
        elif run.step > last:
            for name, kept in self._state["kept"].items():
                trained[name].mul_(kept.unsqueeze(1))

    @override
    def metrics(self) -> dict[str, float]:
        return {} if self._allocator is None else {"adapter_rank": self._rank() / len(self._state["kept"])}

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._state):
            raise ResumeError("the state of adapters is of another method", hint="Resume with the same hooks.")
        for kind, tensors in state.items():
            for name, value in tensors.items():
                self._state[kind][name].copy_(value)

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> nn.Module:
        """Return the model with the adapters merged into its weights; bottlenecks stay where they are."""
        for name, layer in self._adapted(model).items():
            if isinstance(layer, Bottleneck):
                continue
            base = layer.base_layer
            if isinstance(base, nn.Linear):
                layer.merge()
                replace_module(model, name, base)
                continue
            merged = nn.Linear(int(base.weight_shape[1]), int(base.weight_shape[0]), bias=base.bias is not None)
            merged.weight.copy_(base.weight + layer.get_delta_weight(_NAME))
            if base.bias is not None:
                merged.bias.copy_(base.bias)
            replace_module(model, name, merged)
        return model

    def files(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a folder of peft holds: its config, and the tensors of the adapters of `model`, which is not merged yet.

        Of bottlenecks, which peft does not have, it is what `add_bottlenecks` takes.
        """
        if self._settings.method == "bottleneck":
            return self._table, {name: one.detach().contiguous() for name, one in self._trained(model).items()}
        config = self._tuner.peft_config[_NAME]
        kept = self._state.get("kept", {})
        tensors = {}
        for name, parameter in self._trained(model).items():
            mask, tensor = kept.get(_energies_of(name)), parameter.detach()
            if mask is not None:  # Without what was cut.
                tensor = tensor[:, mask] if ".lora_B." in name else tensor[mask]
            tensors[f"base_model.model.{_in_file(name)}"] = tensor.contiguous()
        table = {key: _plain(value) for key, value in config.to_dict().items()}
        table |= {"inference_mode": True, "rank_pattern": {_in_file(name): one.tolist() for name, one in kept.items()}}
        return table, tensors

    @property
    def _table(self) -> dict[str, Any]:
        return bottleneck_table(self._layers, rank=self._settings.rank)

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            name: one
            for name, one in model.named_parameters()
            if (".lora_" in name or BOTTLENECK in name) and one.requires_grad
        }

    def _adapted(self, model: nn.Module) -> dict[str, Any]:
        return {name: one for name, one in model.named_modules() if hasattr(one, "base_layer")}

    def _rank(self) -> int:
        return sum(int(one.sum()) for one in self._state["kept"].values())

    def _weigh(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Note how much the loss depends on each weight, smoothed, and how much that varies."""
        config = self._allocator.peft_config
        for name, gradient in self._gradients.items():
            mean, spread = self._state["mean"][name], self._state["spread"][name]
            now = (trained[name] * gradient).abs()
            mean.mul_(config.beta1).add_(now, alpha=1 - config.beta1)
            spread.mul_(config.beta2).add_((now - mean).abs(), alpha=1 - config.beta2)

    def _cut(self, trained: Mapping[str, nn.Parameter], budget: int) -> None:
        """Keep exactly `budget` ranks of all layers, those that matter most; of equal ones the first."""
        scores = {}
        for name, parameter in trained.items():
            if ".lora_E." in name:
                left, right = (name.replace(".lora_E.", f".lora_{one}.") for one in "AB")
                scores[name] = (
                    self._score(name).view(-1) + self._score(left).mean(dim=1) + self._score(right).mean(dim=0)
                )
                assert len(scores[name]) == len(parameter)
        every = torch.cat([*scores.values()])
        keep = torch.zeros(len(every), dtype=torch.bool, device=every.device)
        keep[torch.argsort(every, descending=True, stable=True)[:budget]] = True
        parts = torch.split(keep, [len(one) for one in scores.values()])
        for name, part in zip(scores, parts, strict=True):
            self._state["kept"][name].copy_(part)
            trained[name].mul_(part.unsqueeze(1))

    def _score(self, name: str) -> Tensor:
        return self._state["mean"][name] * self._state["spread"][name]


def _injected(model: nn.Module, layers: list[str], settings: AdaptSettings) -> Any:
    """Return what peft has put around `layers` of `model`."""
    try:
        peft: Any = import_module("peft")  # Late: it is optional, and takes seconds.
    except ModuleNotFoundError as error:
        raise DependencyError(
            "adapters need an extra", missing=error.name, hint="Install it: pip install 'llm-datastore[compress]'."
        ) from None
    if settings.method == "adalora":
        first = settings.rank + (settings.rank + 1) // 2
        adaptive = peft.AdaLoraConfig(
            target_r=settings.rank,
            init_r=first,
            lora_alpha=settings.alpha * first / settings.rank,  # peft divides it by the first rank.
            target_modules=layers,
            total_step=2,  # The length of the run is known when it starts.
            deltaT=settings.every,
            orth_reg_weight=settings.orthogonal,
        )
        tuner = peft.AdaLoraModel(model, {_NAME: adaptive}, _NAME)
        _begin_as_lora(model)
        return tuner
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=layers, use_dora=settings.method == "dora"
    )
    return peft.LoraModel(model, {_NAME: config}, _NAME)


@torch.no_grad()
def _begin_as_lora(model: nn.Module) -> None:
    """Make the first change of adalora zero in B alone, so that it learns from the first step on."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif ".lora_B." in name:
            parameter.zero_()
        elif ".lora_E." in name:
            parameter.fill_(1.0)


def _energies_of(name: str) -> str:
    """Return the name of the parameter that says how much each rank counts, of the layer that `name` is in."""
    for one in "AB":
        name = name.replace(f".lora_{one}.", ".lora_E.")
    return name


def _in_file(name: str) -> str:
    """Return how peft calls a parameter in a file."""
    return name.replace(f".{_NAME}", "").removesuffix(".weight") + (".weight" if name.endswith(".weight") else "")


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it."""
    if isinstance(value, set):
        return sorted(value)
    return str(value.value) if hasattr(value, "value") else value

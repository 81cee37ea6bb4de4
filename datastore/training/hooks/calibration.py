"""Calibration: rows of the run's own data that are always the same, and the inputs of linear layers when the model reads them.

Every rank reads all of the rows. That costs each rank the passes of all, and in return what is measured does not depend on the
number of ranks, and nothing has to be brought together. The model reads in evaluation mode, in float32, without gradients and
uncompiled: hooks on the modules of compiled blocks would not be called.

    run.calibration.require(128)                                  in `start`: enough rows, or an error before the first step
    squares = square_sums(run.model, linears, run.calibration, count=128)      in `updated`
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from datastore.training.objectives.base import HostRows, MicroBatch, Objective, micro_batches

__all__ = ["Calibration", "grams", "linears_of", "observed", "square_sums"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows to look at a model with."""

    read: Callable[[int], HostRows]
    """So many rows, the same ones each time; raises ConfigError if there are fewer."""

    objective: Objective
    device: torch.device
    micro_rows: int = 8
    """Rows in a forward pass."""

    def require(self, count: int) -> None:
        """Raise unless there are `count` rows.

        Raises:
            ConfigError: there are fewer.
        """
        self.read(count)

    def batches(self, count: int) -> Iterator[MicroBatch]:
        """Yield `count` rows, `micro_rows` at a time."""
        yield from micro_batches(self.read(count), self.device, size=self.micro_rows)

    def show(self, model: nn.Module, count: int) -> None:
        """Let `model` read `count` rows; with parts on several ranks, each must call this."""
        for _ in self._outputs(model, count):
            pass

    def loss(self, model: nn.Module, count: int) -> float:
        """Return the mean loss of `model` on `count` rows."""
        losses = [
            float(self.objective.loss(outputs, batch)) * len(batch.tokens)
            for batch, outputs in self._outputs(model, count)
        ]
        return sum(losses) / count

    @torch.no_grad()
    def _outputs(self, model: nn.Module, count: int) -> Iterator[tuple[MicroBatch, Tensor]]:
        training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"), torch.autocast(self.device.type, enabled=False):
                for batch in self.batches(count):
                    yield batch, self.objective.outputs(model, batch)
        finally:
            model.train(training)


def linears_of(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose weight, such as "model.layers.0.mlp.up_proj.weight", some pattern names, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(f"{name}.weight", pattern) for pattern in patterns)
    }


@contextmanager
def observed(modules: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `take` with the name of a layer and its input, [tokens, in] in float32, whenever one of `modules` reads something."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            x = x.full_tensor() if isinstance(x, DTensor) else x
            take(name, x.reshape(-1, x.shape[-1]).float())

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def square_sums(
    model: nn.Module, linears: Mapping[str, nn.Linear], calibration: Calibration, *, count: int
) -> dict[str, Tensor]:
    """Return the sum of the squares of each input channel of each layer, float32 [in], over `count` rows."""
    found: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        squares = x.square().sum(dim=0)
        found[name] = found[name] + squares if name in found else squares

    with observed(linears, take):
        calibration.show(model, count)
    return found


def grams(
    model: nn.Module, linears: Mapping[str, nn.Linear], calibration: Calibration, *, count: int
) -> dict[str, Tensor]:
    """Return X^T X of the inputs X of each layer, float32 [in, in], over `count` rows.

    Layers that read the same tensor, as queries, keys and values do, share one product, and what is returned for them is one tensor.
    """
    sums: dict[str, Tensor] = {}
    reads_as: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def take(name: str, x: Tensor) -> None:
        if name not in reads_as:
            # Both are referred to here, so the same memory is the same tensor.
            same = bool(last) and last[0][1].data_ptr() == x.data_ptr() and last[0][1].shape == x.shape
            reads_as[name] = last[0][0] if same else name
        if reads_as[name] == name:
            last[:] = [(name, x)]
            product = x.T @ x
            sums[name] = sums[name].add_(product) if name in sums else product

    with observed(linears, take):
        calibration.show(model, count)
    return {name: sums[reads_as[name]] for name in linears if name in reads_as}

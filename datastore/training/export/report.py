"""Models side by side, their cost and their worth: size, bits, non-zeros, FLOPs, tokens per second, losses.

Measured on the CPU in float32, as `evaluate` does. A packed layer is unpacked for each pass: its rate says nothing about kernels that
multiply packed weights.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor, nn

from datastore.display import figure_class, save_figure, short_names
from datastore.document import Document
from datastore.errors import ConfigError
from datastore.training.export.export import open_model
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.export.inference import evaluate
from datastore.training.models.gpt import GPT
from datastore.training.models.heads import Classifier
from datastore.training.models.huggingface import logits_of
from datastore.training.objectives.base import Context, micro_batches
from datastore.units import Progress, telling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ModelReport", "draw", "report"]

_BATCHES = (1, 32)
_TOKENS = 128
_SECONDS = 1.0


class ModelReport(Document, frozen=True, kw_only=True):
    """One model."""

    model: str
    """As it was named."""

    parameters: int
    """Weights that it stands for, packed or not; tied ones once."""

    nonzero: int
    size_bytes: int
    """Of its tensors as an export stores them."""

    flops_per_token: float
    """Of reading one at the full length, in multiplications and additions of weights that are not zero, and of attention."""

    tokens_per_s: dict[str, float]
    """Read in a batch of so many rows, by one thread of this machine."""

    loss: float | None = None
    """Nats per token; None: there was no run to say what is held out."""

    sources: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Of a weight, on average, with whatever it needs besides."""
        return 8 * self.size_bytes / self.parameters


def report(
    models: Sequence[str | os.PathLike[str]],
    *,
    run: str | os.PathLike[str] = "",
    data: str | os.PathLike[str] = "",
    progress: Progress | None = None,
) -> list[ModelReport]:
    """Return what there is to say about each of `models`, runs or Hugging Face folders, in their order.

    Losses are on what `run` holds out (by default the first run among them), or on the dataset `data`.
    `progress` is told of each model that is done.

    Raises:
        MissingError: there is no such model.
        ConfigError: the data do not fit a model.
    """
    from datastore.storage.resolve import open_storage  # noqa: PLC0415 - beside its use
    from datastore.training.run.folder import is_run  # noqa: PLC0415 - so here

    names = [os.fspath(one) for one in models]
    run = os.fspath(run) or next((name for name in names if is_run(open_storage(name))), "")
    found = []
    for name in telling(names, progress):
        one = _of(name, open_model(name))
        if run:
            measured = evaluate(name, run=run, data=data)
            one = msgspec.structs.replace(one, loss=measured.loss, sources=measured.sources)
        found.append(one)
    return found


def _of(name: str, loaded: HuggingFaceModel) -> ModelReport:
    weights = _weights(loaded.model)
    nonzero = {key: int((one != 0).sum()) for key, one in weights.items()}
    looked_up = _looked_up(loaded.model)
    multiplied = sum(count for key, count in nonzero.items() if weights[key].dim() == 2 and key not in looked_up)
    attention = 0.0
    if isinstance(loaded.model, GPT | Classifier):
        shape = loaded.model.settings
        attention = 2.0 * shape.layers * shape.heads * shape.head_size * loaded.seq_len  # Half of the pairs are masked.
    tensors = {id(one): one for one in loaded.model.state_dict(keep_vars=True).values()}.values()
    return ModelReport(
        model=name,
        parameters=sum(one.numel() for one in weights.values()),
        nonzero=sum(nonzero.values()),
        size_bytes=sum(one.numel() * one.element_size() for one in tensors),
        flops_per_token=2.0 * multiplied + attention,
        tokens_per_s={str(rows): _rate(loaded, rows) for rows in _BATCHES},
    )


def _looked_up(model: nn.Module) -> set[str]:
    """Return the names of the matrices of which a token looks rows up; one that is the output layer, too, is multiplied."""
    gpts = [one for one in model.modules() if isinstance(one, GPT) and one.lm_head is None]
    tables = {name: one.weight for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    multiplied = {
        id(one.weight) for one in model.modules() if hasattr(one, "weight") and not isinstance(one, nn.Embedding)
    }
    multiplied |= {id(one.model.embed_tokens.weight) for one in gpts}
    return {f"{name}.weight" for name, one in tables.items() if id(one) not in multiplied}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a model stands for: those of packed layers unpacked."""
    found = {name: one.detach() for name, one in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "weight_shape"):
            found[f"{name}.weight"] = module.weight
    return found


@torch.inference_mode()
def _rate(loaded: HuggingFaceModel, rows: int) -> float:
    """Return how many tokens a second the model reads with one thread, of the fastest pass within a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # Others' threads on a busy machine cost little; waiting for one's own costs a hundred times as much.
    try:
        return _fastest(loaded, rows)
    finally:
        torch.set_num_threads(threads)


def _fastest(loaded: HuggingFaceModel, rows: int) -> float:
    read, tokens = _reading(loaded, rows)
    read()
    best, end = 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or not best:
        started = time.perf_counter()
        read()
        best = max(best, tokens / (time.perf_counter() - started))
    return best


def _reading(loaded: HuggingFaceModel, rows: int) -> tuple[Callable[[], Tensor], int]:
    """Return what reads so many rows, and how many tokens those are; of a model that sees more than tokens, what its objective makes."""
    model, objective = loaded.model.eval(), loaded.objective
    if objective is None or objective.form in {"causal", "masked"}:
        ids = torch.zeros((rows, min(_TOKENS, loaded.seq_len)), dtype=torch.int64)
        return lambda: logits_of(model, ids), ids.numel()
    context = Context(seed=0, seq_len=loaded.seq_len, vocab_size=objective.vocabulary)
    (batch,) = micro_batches(objective.blank(rows, context), torch.device("cpu"), size=rows)
    return lambda: objective.outputs(model, batch), rows * objective.tokens_per_sample(loaded.seq_len)


def draw(found: Sequence[ModelReport], path: Path) -> "Figure":
    """Save a picture of the loss of each model against its size.

    Raises:
        ConfigError: no loss is known, or the picture cannot be saved.
        DependencyError: matplotlib is not installed.
    """
    new_figure = figure_class()
    known = [(one, one.loss) for one in found if one.loss is not None]
    if not known:
        raise ConfigError("there is no loss to draw", hint="Name a run that says what is held out.")
    figure = new_figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    names = short_names([one.model for one, _ in known])
    for name, (one, loss) in zip(names, known, strict=True):
        axis.plot(one.size_bytes / 1e6, loss, "o")
        axis.annotate(name, (one.size_bytes / 1e6, loss))
    axis.set_xlabel("size (MB)")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
    return figure

"""A trained model in use: text from it, and its validation loss outside of training.

Tokens are drawn one at a time from the model's own distribution, the same for the same seed.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from datastore.dataset.snapshot import open_dataset
from datastore.document import SettingsDocument
from datastore.errors import ConfigError
from datastore.loader.settings import Rank
from datastore.storage.resolve import open_storage
from datastore.training.export.export import open_model
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.models.gpt import GPT
from datastore.training.models.huggingface import Continuation
from datastore.training.objectives.catalog import make_objective
from datastore.training.parallel.lesson import Lesson
from datastore.training.parallel.whole import alone
from datastore.training.run.architecture import context_of
from datastore.training.run.feed import held_out
from datastore.training.run.folder import RunConfig, RunFolder, is_run, open_split
from datastore.training.run.split import Split
from datastore.training.validation import Evaluation, loss_over, mean_of, parts_of
from datastore.units import Progress

__all__ = ["Sampling", "evaluate", "generate", "sample_tokens"]


class Sampling(SettingsDocument, frozen=True, kw_only=True):
    """How the next token is chosen."""

    tokens: Annotated[int, msgspec.Meta(gt=0)] = 128
    """At most so many new ones; the end-of-text token ends it earlier."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.8
    """0 takes the likeliest token each time."""

    top_k: Annotated[int, msgspec.Meta(ge=0)] = 50
    """Only the likeliest k tokens are drawn from; 0: all."""

    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The same seed gives the same text."""

    cache_bits: Literal[0, 8] = 0
    """Of the keys and values of the tokens seen so far: with 8 they take about a quarter of the memory, and each head of each token has a
    scale. 0: they stay as they are."""


def generate(
    source: str | os.PathLike[str], prompt: str, *, sampling: Sampling | None = None, step: int | None = None
) -> str:
    """Return `prompt`, as it is, and what the model goes on with.

    `source` is a run folder (at `step`, or its newest checkpoint) or a Hugging Face folder. `sampling` says how many tokens,
    and how they are drawn; by default `Sampling()`.

    Raises:
        MissingError: no model is there.
        ConfigError: the model has not learned to go on with a text; it has no tokenizer, or neither prompt nor end-of-text token to start from.
    """
    source = os.fspath(source)
    loaded = open_model(source, step=step)
    _refuse_silent(loaded, source)
    if loaded.tokenizer is None:
        raise ConfigError("the model has no tokenizer", source=source, hint="Export it from a dataset that names one.")
    tokenizer = Tokenizer.from_str(loaded.tokenizer.decode())
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    start = ids or ([loaded.end_of_text] if loaded.end_of_text is not None else [])
    if not start:
        raise ConfigError("there is nothing to start from", hint="Give a `prompt`.")
    new = list(sample_tokens(loaded, start, sampling or Sampling()))
    # Decoded together: what a token is as text can depend on the one before it. But of the prompt the text is known, and
    # a tokenizer may not give it back: spaces at its ends, a special token in it, or a word that it does not know.
    whole = str(tokenizer.decode(ids + new, skip_special_tokens=True))
    own = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not whole.startswith(own):
        whole, own = str(tokenizer.decode(new, skip_special_tokens=True)), ""
    return prompt + whole.removeprefix(own)


def _refuse_silent(loaded: HuggingFaceModel, source: str) -> None:
    """Refuse a model that has not learned to go on with a text."""
    objective, model = loaded.objective, loaded.model
    learned = objective is None or objective.form == "causal"
    if learned and (isinstance(model, GPT) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))):
        return
    raise ConfigError(
        "the model has not learned to go on with a text",
        source=source,
        model=type(model).__name__,
        **({} if objective is None else {"objective": type(objective).__name__}),
        hint="Use `datastore evaluate`, or the model from Python: `open_model`.",
    )


@torch.inference_mode()
def sample_tokens(loaded: HuggingFaceModel, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """Yield new tokens behind `prompt`, each as soon as it is drawn."""
    go_on = Continuation(loaded.model.eval(), rounded=sampling.cache_bits > 0)
    generator = torch.Generator().manual_seed(sampling.seed)
    # Positions beyond the trained length were never seen: the prompt keeps its end, and the answer fits behind it.
    room = max(1, loaded.seq_len - sampling.tokens)
    ids = torch.tensor([prompt[-room:]])
    for _ in range(min(sampling.tokens, loaded.seq_len)):
        token = _draw(go_on(ids).float(), sampling, generator)
        if token == loaded.end_of_text:
            return
        yield token
        ids = torch.tensor([[token]])


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.numel()))
        logits = torch.full_like(logits, float("-inf")).scatter(0, kept.indices, kept.values)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


_ROWS = 16


def evaluate(
    source: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] = "",
    data: str | os.PathLike[str] = "",
    step: int | None = None,
    samples: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the loss of the model at `source` on what `run` holds out, or on the dataset `data`, in float32 on the CPU.

    `source` is a run (at `step`, or its newest checkpoint) or a Hugging Face folder; `run` may be left out if `source` is
    one. `samples` 0: as many as the run validates on. `progress` gets the samples that were looked at, and all.

    Raises:
        MissingError: no model, no run, or no dataset there.
        ConfigError: there is no run whose samples could be used, or it holds nothing out.
    """
    source, run = os.fspath(source), os.fspath(run)
    run = run or source
    if not is_run(open_storage(run)):
        raise ConfigError(
            "no run says what to validate on", source=source, hint="Name the run that the model is from: `run=RUN`."
        )
    config = RunFolder.open(run).config()
    settings = config.settings
    loaded = open_model(source, step=step)
    objective = loaded.objective or make_objective(settings.objective)
    samples_of = held_out(
        _split_of(config, os.fspath(data)),
        settings,
        objective,
        context_of(config),
        count=samples or settings.eval.samples,
        rank=Rank(),
    )
    strategy = alone()
    strategy.distribute(loaded.model)
    lesson = Lesson(objective, {}, strategy.ranks.device, "fp32")
    total, done = sum(len(one.mine) for one in samples_of), 0
    found = []
    for one in samples_of:
        parts = _telling(parts_of(one, strategy, rows=_ROWS), progress, rows=len(one.mine), before=done, total=total)
        found.append(loss_over(loaded.model, one, parts, lesson=lesson, strategy=strategy))
        done += len(one.mine)
    return msgspec.structs.replace(mean_of(samples_of, found), step=loaded.step, passed_over=loaded.passed_over)


def _split_of(config: RunConfig, data: str) -> Split:
    """Return what a run holds out; with `data`, all of that dataset in its place.

    Raises:
        ConfigError: it holds something else, or was made with another tokenizer.
    """
    split = open_split(config)
    if not data:
        return split
    own, other = split.datasets[0], open_dataset(data)
    if own.kind != other.kind or own.commit.tokenizer != other.commit.tokenizer:
        raise ConfigError(
            "the model was trained on data of another kind, or another tokenizer",
            url=other.url,
            holds=other.kind,
            trained_on=own.kind,
            hint="Ingest the data with the tokenizer of the training dataset.",
        )
    rows = split.rows and replace(split.rows, held_out=np.arange(int(other.segments.documents.sum())))
    return replace(split, validation={"": other}, rows=rows)


def _telling(
    parts: Sequence[slice], progress: Progress | None, *, rows: int, before: int, total: int
) -> Iterator[slice]:
    """Yield `parts`, and tell of each when it is done with."""
    for part in parts:
        yield part
        if progress is not None:
            progress(before + min(part.stop, rows), total)

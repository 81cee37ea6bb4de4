"""`teach`: a dataset becomes another one, which has beside each token what a trained model expects after it.

Of each distribution the likeliest `top` tokens are kept, as two columns: `teacher_tokens`, and `teacher_logprobs`, their logarithms. These are the
logits less one number, so a softmax over them is the same; and what they leave of 1 is the share of all other tokens. In a sample
they stand at the token that was read: those at position t speak of the token at t + 1.

A document is read alone, from its beginning. One that is longer than the model can read is read in windows that overlap by half, so
every token behind the first window has at least half a window before it.

It is an ingest whose tasks are the shards of the source: each is marked done when it is stored, one commit makes them visible, and the same
call goes on after a kill. The bytes are the same again on the same kind of machine; another one may round otherwise.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from datastore.dataset.journal import Journal, Part, Plan, SourceFile, Task, TaskDone
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import put_tokenizer, read_token_table, shard_uid, write_token_shard
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_hex
from datastore.errors import ConfigError
from datastore.formats.tokens import TokenTable, offsets_of, token_dtype
from datastore.ingestion.destination import Destination, open_target
from datastore.ingestion.plan import ingest_id_of, known_files
from datastore.ingestion.reading.stored import require_unwritten, shard_file, source_name
from datastore.training.export.export import open_model
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.launcher import Launch
from datastore.training.machine import pick_device
from datastore.training.models.gpt import GPT
from datastore.training.models.huggingface import logits_of
from datastore.units import Progress

__all__ = ["Taught", "teach"]

_LOGITS_BYTES = 2**28
"""What the logits of the windows that are read together may take."""


@dataclass(frozen=True, slots=True)
class Taught:
    """What `teach` did."""

    url: str
    version: int
    """The dataset's version that has it all."""

    added: bool
    """Whether that version is new; false if there was nothing to add."""

    documents: int
    tokens: int
    shards: int
    shards_resumed: int
    """How many of them an interrupted run had done."""

    model_step: int | None
    """The step of the run that taught; None if it was no run."""


def teach(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    step: int | None = None,
    top: int = 8,
    progress: Progress | None = None,
) -> Taught:
    """Add the documents of the dataset `source` to the one at `to`, each token with what `model` expects after it.

    `model` is a run (at `step`, or its newest checkpoint) or a Hugging Face folder. Columns that the tokens have stay. `progress` gets the
    tokens that were read, and all.

    Raises:
        ConfigError: the model has another tokenizer, or fewer tokens than `top`; or `to` holds something else, or `source` has
            been rewritten since a part of it was taken.
        MissingError: there is no dataset, or no model.
        StorageError: something cannot be read or written. Run it again to go on.
    """
    dataset, target = open_dataset(os.fspath(source)), open_target(os.fspath(to))
    teacher = _Teacher(open_model(os.fspath(model), step=step), top)
    teacher.require_fitting(dataset)
    _require_fitting(target, dataset, teacher)
    plan = _plan(dataset, target, teacher.digest())
    before = target.newest.version if target.newest else 0
    if not plan.tasks:
        return Taught(target.storage.url, before, False, 0, 0, 0, 0, teacher.step)
    create_dataset(target.storage)
    ref, raw = dataset.commit.tokenizer, dataset.tokenizer()
    if ref is not None and raw is not None:
        put_tokenizer(target.storage, raw, vocab_size=ref.vocab_size, end_of_text=ref.end_of_text)
    journal = Journal(target.storage, plan.ingest_id)
    done = resumed = journal.begin(plan)
    total = dataset.totals.tokens
    for index, task in _by_place(dataset, plan):
        if task.id not in done:
            done = {**done, task.id: _do(dataset, index, task, journal, teacher)}
        if progress is not None:
            progress(min(total, sum(each.tokens for each in done.values())), total)
    journal.require_plan()
    shards = [shard for task in plan.tasks for shard in done[task.id].shards]
    commit = commit_shards(
        target.storage, shards, ingest_id=plan.ingest_id, tokenizer=ref, config_digest=plan.reading_digest
    )
    return Taught(
        url=target.storage.url,
        version=commit.version,
        added=commit.version != before,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=len(shards),
        shards_resumed=len(resumed),
        model_step=teacher.step,
    )


def _plan(dataset: Dataset, target: Destination, reading_digest: str) -> Plan:
    """Return the plan for the shards of `dataset` that `target` does not have yet."""
    name = source_name(dataset)
    every = [shard_file(dataset, index, name) for index in range(len(dataset.segments))]
    history = [(commit, plan) for commit, plan in target.ingests() if plan is not None]
    require_unwritten(every, [(commit, plan.files) for commit, plan in history])
    known, _ = known_files(history, every)
    files = tuple(file for file in every if file.fingerprint not in known)
    return Plan(
        ingest_id=ingest_id_of(files, kind="tokens", reading_digest=reading_digest),
        kind="tokens",
        reading_digest=reading_digest,
        sources=(dataset.url,),
        skipped={},
        known=len(every) - len(files),
        files=files,
        tasks=tuple(_task(at, file, reading_digest) for at, file in enumerate(files)),
    )


def _task(at: int, file: SourceFile, reading_digest: str) -> Task:
    name = digest_hex(f"{reading_digest}\n{file.fingerprint}".encode())
    return Task(id=name, parts=(Part(file=at, start=0, stop=file.size_bytes),))


def _by_place(dataset: Dataset, plan: Plan) -> Iterator[tuple[int, Task]]:
    places = {dataset.segments.shard(index).path: index for index in range(len(dataset.segments))}
    for task in plan.tasks:
        yield places[plan.files[task.parts[0].file].path.partition("/")[2]], task


def _do(dataset: Dataset, index: int, task: Task, journal: Journal, teacher: "_Teacher") -> TaskDone:
    """Store what becomes of one shard, and mark it done."""
    documents, live = dataset.live_documents(index), dataset.live_rows(index)
    table = _only(read_token_table(dataset.storage, dataset.segments.shard(index)), live)
    shards = []
    if documents.num_rows:
        written = write_token_shard(
            journal.storage,
            uid=shard_uid(task.id, 0),
            values=table.values,
            offsets=table.offsets,
            documents=documents,
            columns={**table.columns, **teacher.columns(table)},
        )
        shards.append(written)
    made = TaskDone(
        task_id=task.id,
        shards=tuple(shards),
        documents=documents.num_rows,
        tokens=table.values.size,
        text_bytes=0,
        rejected={},
        skipped={},
        rejects_digest="",
        ids_digest="",
        encoder="",
    )
    return journal.finish(made, rejects=b"", ids=b"")


def _only(table: TokenTable, live: npt.NDArray[np.bool_] | None) -> TokenTable:
    """Return the documents of `table` that are `live`."""
    if live is None:
        return table
    counts = np.diff(table.offsets)
    kept = np.repeat(live, counts)
    columns = {name: values[kept] for name, values in table.columns.items()}
    return TokenTable(table.values[kept], offsets_of(counts[live]), columns)


def _require_fitting(target: Destination, dataset: Dataset, teacher: "_Teacher") -> None:
    """Raise unless what is made can be added to what is there: better now than after all the reading."""
    if target.newest is None:
        return
    target.require_kind("tokens")
    there = open_dataset(target.storage)
    columns = {column.name: column.width for column in there.segments.shard(0).layout.columns} if there.segments else {}
    if there.commit.tokenizer != dataset.commit.tokenizer or columns.get("teacher_tokens") != teacher.top:
        raise ConfigError(
            "the dataset holds other tokens, or has not the same columns",
            url=there.url,
            columns=columns,
            top=teacher.top,
            hint="Name another URL.",
        )


class _Window(NamedTuple):
    """Tokens `[start, stop)` are read together; of those from `first` on the answers are kept."""

    start: int
    first: int
    stop: int


def _vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a language model knows.

    Raises:
        ConfigError: it is none that reads from left to right.
    """
    if isinstance(model, GPT) and model.causal:
        return model.settings.vocab_size
    if type(model).__name__.endswith("ForCausalLM"):
        return int(getattr(model, "config").vocab_size)  # noqa: B009 - of transformers, which need not be here
    raise ConfigError(
        "a teacher reads from left to right and tells the next token",
        model=type(model).__name__,
        hint="Name a run with the objective `causal`, or a folder with such a model.",
    )


class _Teacher:
    """A model, and how many tokens of each of its answers are kept."""

    def __init__(self, loaded: HuggingFaceModel, top: int) -> None:
        self.top = top
        self.step = loaded.step
        self.vocab_size = _vocabulary_of(loaded.model)
        self._seq_len = loaded.seq_len
        self._tokenizer = loaded.tokenizer
        self._device = pick_device("auto", Launch())
        self._model = loaded.model.eval().to(self._device)
        if not 0 < top <= self.vocab_size:
            raise ConfigError("so many tokens cannot be kept", top=top, vocab_size=self.vocab_size, hint="Try `top=8`.")

    def require_fitting(self, dataset: Dataset) -> None:
        """Raise unless the model reads the tokens of `dataset`."""
        if dataset.kind != "tokens":
            raise ConfigError("the dataset holds text, not tokens", url=dataset.url, hint="Retokenize it first.")
        own, ref = self._tokenizer, dataset.commit.tokenizer
        if own is not None and ref is not None and own != dataset.tokenizer():
            raise ConfigError(
                "the model has another tokenizer than the dataset",
                url=dataset.url,
                hint="Make a dataset with that of the model: `datastore retokenize`.",
            )
        if ref is not None and ref.vocab_size > self.vocab_size:
            raise ConfigError("the model knows fewer tokens than the dataset", model=self.vocab_size, url=dataset.url)

    def digest(self) -> str:
        """Return the digest of all that the answers depend on."""
        tensors = sorted(self._model.state_dict().items())
        raw = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for _, tensor in tensors]
        names = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors]
        return digest_hex(f"teach 1/{self.top}/{self._seq_len}\n{names}".encode(), *raw)

    def columns(self, table: TokenTable) -> dict[str, npt.NDArray[Any]]:
        """Return the answers for all tokens of `table`, [T, top] each."""
        likely = np.zeros((table.values.size, self.top), token_dtype(self.vocab_size))
        logprobs = np.zeros((table.values.size, self.top), np.float16)
        windows = [window for start, stop in pairwise(table.offsets.tolist()) for window in self._windows(start, stop)]
        for batch in self._batches(windows):
            found, scores = self._answers([table.values[window.start : window.stop] for window in batch])
            for row, window in enumerate(batch):
                kept = slice(window.first - window.start, window.stop - window.start)
                likely[window.first : window.stop] = found[row, kept]
                logprobs[window.first : window.stop] = scores[row, kept]
        return {"teacher_tokens": likely, "teacher_logprobs": logprobs}

    def _windows(self, start: int, stop: int) -> Iterator[_Window]:
        first, begin = start, start
        while first < stop:
            end = min(stop, begin + self._seq_len)
            yield _Window(begin, first, end)
            first, begin = end, end - self._seq_len // 2

    def _batches(self, windows: Sequence[_Window]) -> Iterator[Sequence[_Window]]:
        rows = max(1, _LOGITS_BYTES // (4 * self._seq_len * self.vocab_size))
        for at in range(0, len(windows), rows):
            yield windows[at : at + rows]

    @torch.inference_mode()
    def _answers(self, rows: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the likeliest tokens and their logarithms, [B, T, top]; what is behind the end of a row means nothing."""
        ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, values in enumerate(rows):
            ids_BT[row, : len(values)] = values
        # Padding stands behind: a causal model does not see it.
        ids = torch.from_numpy(ids_BT).to(self._device)
        logits_BTV = logits_of(self._model, ids).float()
        scores, found = logits_BTV.log_softmax(dim=-1).topk(self.top, dim=-1)
        return found.cpu().numpy(), scores.cpu().numpy()

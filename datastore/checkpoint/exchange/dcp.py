"""The storage behind `torch.distributed.checkpoint` (DCP): its users switch by one argument, and keep their calls.

    dcp.save(state, checkpoint_id="runs/first/step-1000", storage_writer=DcpWriter())
    dcp.load(state, checkpoint_id="runs/first/step-1000", storage_reader=DcpReader())

The step is written as any other one of a run: verified, committed at once or not at all, without pickles. So `Checkpointer`, the
trainer and `datastore checkpoint` read it, and DCP reads what they wrote. Which rank writes and reads what is DCP's plan; its
collectives are those of the process group that it is given.

Two things are other than with files of DCP: what is no tensor must be a plain value (numbers, texts, lists, maps), and nothing is
cast on load, where DCP copies float32 into int8 without a word.

Everything that is to be read is verified in DCP's planning, whose errors reach all ranks, before any of them writes to a tensor.
"""

import io
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import planner as plans
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from datastore.checkpoint.exchange.paths import Leaf, Path, StepPlace, item_trees, leaves_of, tensor_name
from datastore.checkpoint.format.manifest import Entry, StepRef
from datastore.checkpoint.format.tree import TensorSpec
from datastore.checkpoint.keeping import Keep, collect
from datastore.checkpoint.loading.reader import Reader, Transfer
from datastore.checkpoint.ranks import SavingRank, ensure_run
from datastore.checkpoint.saving.commit import build_commit, gather_parts, put_commit, write_hint
from datastore.checkpoint.saving.snapshot import BufferPool, Captured, Snapshot
from datastore.checkpoint.saving.write import Known, stage, write_share
from datastore.checkpoint.steps import CheckpointerSettings, StepLog, WholeStep
from datastore.checkpoint.tensors import DTYPES, Box, TensorPiece, describe, memory_key
from datastore.errors import ConfigError, ConflictError, MissingError, ResumeError

__all__ = ["DcpReader", "DcpWriter"]

_OPTIONS = CheckpointerSettings()


class DcpWriter(StorageWriter):
    """A `storage_writer` for `dcp.save` and `dcp.async_save`.

    `checkpoint_id` names run and step in one path that ends with a number: `runs/first/step-1000`. Or pass the URL of the run and
    the step here. `keep` says how many steps stay (all, if None).
    """

    def __init__(
        self, url: str | os.PathLike[str] | None = None, *, step: int | None = None, keep: Keep | None = None
    ) -> None:
        self._place = StepPlace(url, step)
        self._keep = keep
        self._rank = 0
        self._pool = BufferPool()

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._place.reset(checkpoint_id)

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0 if is_coordinator else 1)
        if kwargs.get("use_collectives", True) is False:
            raise ConfigError("ranks must save together", use_collectives=False, hint="Leave use_collectives as it is.")

    @override
    def prepare_local_plan(self, plan: plans.SavePlan) -> plans.SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[plans.SavePlan]) -> list[plans.SavePlan]:
        """Decide what the step is called; every rank is told.

        Raises:
            ConflictError: the run has this step already, or a later one.
        """
        storage, step = self._place.storage(), self._place.step or 0
        later = [each for each in StepLog(storage).steps() if each >= step]
        if later:
            raise ConflictError(
                "the run has this step already, or later ones",
                step=step,
                steps=later,
                url=storage.url,
                hint="Save to a later step or another run, or drop those with `datastore checkpoint rewind`.",
            )
        session = uuid.uuid4().hex
        ensure_run(SavingRank(storage, 0, len(plans), session, _OPTIONS))
        told = (step, session, len(plans))
        return [replace(plan, storage_data=told) for plan in plans]

    @override
    def write_data(self, plan: plans.SavePlan, planner: plans.SavePlanner) -> "Future[list[WriteResult]]":
        """Write this rank's part.

        Raises:
            ConfigError: a value cannot be stored; the message has its path.
            StorageError: the storage failed; there is no step.
        """
        member, ref = self._member(plan.storage_data)
        run = ensure_run(member)
        paths: dict[str, Path] = getattr(planner, "mappings", None) or {}
        results, pieces = [], []
        for item in plan.items:
            path = paths.get(item.index.fqn, (item.index.fqn,))
            data = planner.resolve_data(item)
            if isinstance(data, torch.Tensor):
                pieces.append(_captured(item, data.detach(), path))
                results.append(WriteResult(item.index, pieces[-1].size_bytes, (path, None)))
            else:
                results.append(WriteResult(item.index, len(data.getbuffer()), (path, _plain(data, item.index.fqn))))
        snapshot = Snapshot({}, {}, tuple(_without_twins(pieces)))
        share = stage(snapshot, Known(), self._pool, threads=_OPTIONS.threads, copy=False)
        try:
            write_share(member, run.run_id, ref, snapshot=snapshot, staged=share)
        finally:
            if share.buffer is not None:
                self._pool.give(share.buffer)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        self._told = plan.storage_data
        return done

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the step: from here on it exists.

        Raises:
            ConflictError: a tensor is not there as a whole, or another process saved the step.
        """
        member, ref = self._member(self._told)
        values = {result.index.fqn: result.storage_data for part in results for result in part}
        leaves = []
        for fqn, stored in metadata.state_dict_metadata.items():
            path, value = values[fqn]
            leaves.append((path, _spec_of(stored, fqn) if isinstance(stored, TensorStorageMetadata) else value))
        parts = gather_parts(member, ref)
        newest = StepLog(member.storage).newest()
        parent = None if newest is None else StepLog(member.storage).read_if_sound(newest)
        commit = build_commit(
            member, parts, parent=None if parent is None else parent.ref, items=item_trees(leaves), metrics={}
        )
        put_commit(member.storage, commit)
        write_hint(member.storage, ref)
        if self._keep is not None:
            collect(member.storage, self._keep, session=member.session)

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _member(self, told: tuple[int, str, int]) -> tuple[SavingRank, StepRef]:
        step, session, world = told
        member = SavingRank(self._place.storage(), self._rank, world, session, _OPTIONS)
        return member, member.save_ref(step, 1)


class DcpReader(StorageReader):
    """A `storage_reader` for `dcp.load`, for steps that `DcpWriter`, `Checkpointer` or the trainer saved.

    `checkpoint_id` is as for `DcpWriter`; without a number the newest step is read.
    """

    def __init__(self, url: str | os.PathLike[str] | None = None, *, step: int | None = None) -> None:
        self._place = StepPlace(url, step)
        self._leaves: dict[str, Leaf] = {}
        self._whole: WholeStep | None = None

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._place.reset(checkpoint_id)

    @override
    def read_metadata(self, *_: Any) -> Metadata:
        """Return what is in the step.

        Raises:
            MissingError: there is no such step.
            CorruptError: its documents are damaged.
        """
        log = StepLog(self._place.storage())
        step = self._place.step if self._place.step is not None else log.newest()
        if step is None:
            raise MissingError("the run has no checkpoint", url=log.url, hint="Check the path.")
        self._whole = log.read_whole(step)
        self._leaves = leaves_of(self._whole.commit.items)
        entries = _entries_by_tensor(self._whole)
        found: dict[str, Any] = {}
        for fqn, leaf in self._leaves.items():
            if leaf.spec is None:
                found[fqn] = BytesStorageMetadata()
                continue
            chunks = [
                ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.shape))
                for entry, _ in entries[leaf.tensor]
            ]
            properties = TensorProperties(dtype=DTYPES[leaf.spec.dtype])
            found[fqn] = TensorStorageMetadata(properties, torch.Size(leaf.spec.shape), chunks)
        return Metadata(found, planner_data={fqn: leaf.path for fqn, leaf in self._leaves.items()})

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    @override
    def prepare_local_plan(self, plan: plans.LoadPlan) -> plans.LoadPlan:
        """Verify all that this rank is to read; an error here reaches every rank.

        Raises:
            CorruptError: bytes do not match; nothing has been overwritten on any rank.
        """
        items = [item for item in plan.items if item.type == plans.LoadItemType.TENSOR]
        self._reader((item, torch.empty(item.lengths, device="meta")) for item in items).verify()
        return plan

    @override
    def prepare_global_plan(self, plans: list[plans.LoadPlan]) -> list[plans.LoadPlan]:
        return plans

    @override
    def read_data(self, plan: plans.LoadPlan, planner: plans.LoadPlanner) -> "Future[None]":
        """Fill the tensors and hand over the plain values.

        Raises:
            ResumeError: a tensor has another dtype than the one that was saved; nothing has been overwritten on this rank.
            CorruptError: bytes changed since they were verified; tensors are partly overwritten.
        """
        targets = []
        values = []
        for item in plan.items:
            if item.type == plans.LoadItemType.TENSOR:
                targets.append((item, planner.resolve_tensor(item).detach()))
            else:
                values.append(item)
        self._check_dtypes(targets)
        self._reader(targets).deliver()
        for item, target in targets:
            planner.commit_tensor(item, target)
        for item in values:
            data = io.BytesIO()
            torch.save(self._leaves[item.storage_index.fqn].value, data)
            data.seek(0)
            planner.load_bytes(item, data)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _check_dtypes(self, targets: Iterable[tuple[plans.ReadItem, torch.Tensor]]) -> None:
        differ = []
        for item, target in targets:
            spec = self._leaves[item.storage_index.fqn].spec
            if spec is not None and DTYPES[spec.dtype] != target.dtype:
                differ.append(f"{item.storage_index.fqn}: saved as {spec}, expected as {target.dtype}")
        if differ:
            hint = "Load into tensors of the dtype that was saved, and cast them then."
            raise ResumeError("what is saved does not fit", differ=differ, hint=hint)

    def _reader(self, targets: Iterable[tuple[plans.ReadItem, torch.Tensor]]) -> Reader:
        assert self._whole is not None
        entries = {
            (entry.tensor, entry.offsets): (entry, chunk_bytes)
            for found in _entries_by_tensor(self._whole).values()
            for entry, chunk_bytes in found
        }
        transfers = []
        for item, target in targets:
            entry, chunk_bytes = entries[self._leaves[item.storage_index.fqn].tensor, _offsets(item.storage_index)]
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            transfers.append(Transfer(entry, box, target, chunk_bytes))
        return Reader(self._place.storage(), transfers, threads=_OPTIONS.threads)


def _captured(item: plans.WriteItem, data: torch.Tensor, path: Path) -> Captured:
    assert item.tensor_data is not None
    name, chunk = tensor_name(path), item.tensor_data.chunk
    spec = describe(data, name)
    assert spec is not None
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if box.shape != tuple(data.shape):
        # torch 2.13 does so where FSDP2 cuts what tensor parallelism has cut, if rows do not divide.
        hint = "Save with Checkpointer, or pad the tensor to a multiple of the ranks."
        raise ConfigError(
            "DCP gives a piece that is not what it plans",
            path=item.index.fqn,
            planned=box.shape,
            given=tuple(data.shape),
            hint=hint,
        )
    piece = TensorPiece(data, box, replicated=False, first=True)
    return Captured(name, TensorSpec(spec.dtype, tuple(item.tensor_data.size)), piece, ())


def _without_twins(pieces: Iterable[Captured]) -> Iterable[Captured]:
    """Yield the pieces, those of the same memory as one with several names."""
    same: defaultdict[Any, list[Captured]] = defaultdict(list)
    for piece in pieces:
        key = memory_key(piece.piece.tensor) if piece.piece.box.elements else piece.name
        same[key, piece.piece.box, piece.spec].append(piece)
    for first, *others in same.values():
        yield Captured(first.name, first.spec, first.piece, tuple(other.name for other in others))


def _plain(data: io.BytesIO, fqn: str) -> Any:
    """Return a value that DCP has pickled, if it is a plain one."""
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:  # noqa: BLE001 - of whatever kind, it says that this is no plain value
        raise ConfigError(
            "this value cannot be stored in a checkpoint",
            path=fqn,
            reason=(str(error) or type(error).__name__).splitlines()[0],
            hint="Store tensors, numbers, texts, bools, None, lists and dicts of them; convert the rest.",
        ) from None


def _spec_of(stored: TensorStorageMetadata, fqn: str) -> TensorSpec:
    spec = describe(torch.empty(0, dtype=stored.properties.dtype), fqn)
    assert spec is not None
    return TensorSpec(spec.dtype, tuple(stored.size))


def _entries_by_tensor(whole: WholeStep) -> dict[str, list[tuple[Entry, int]]]:
    found: defaultdict[str, list[tuple[Entry, int]]] = defaultdict(list)
    for info in whole.parts:
        for entry in info.entries:
            found[entry.tensor].append((entry, info.chunk_bytes))
    return found


def _offsets(index: MetadataIndex) -> tuple[int, ...]:
    return tuple(index.offset or ())

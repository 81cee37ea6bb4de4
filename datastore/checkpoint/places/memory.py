"""Each step in the memory of two ranks: after the death of one the others go on from there, and no storage is asked.

    memory = MemoryCheckpointer(dist.new_group(backend="gloo"))
    handle = memory.save(step, items)                # returns at once
    with memory.guard():
        optimizer.step()                             # waits while a save still copies
    ...
    memory.restore(items, group=new_group)           # a rank has died, and another one came in its place

Each rank copies its share of the state into memory of its own, at the speed of memcpy, and a thread sends it to the next rank, while training
goes on. A step counts once each part is with two ranks, and only then is the step before it let go: so there is always one that
survives the death of a rank, at whatever moment. Where two neighbours die together a part is lost, and a storage is needed.

It is for programs whose other ranks live on when one dies. Where a launcher ends them all, as `torchrun` does, nothing is left; there a folder in
memory is better (`Checkpointer("/dev/shm/run")`), as long as the machine stays.

Memory of each rank: two steps, each with its own part and that of the rank before it, and the documents of all ranks (some 400 bytes for each
piece of a tensor). While it restores, also the parts that its items need and that it does not hold.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial as bind
from typing import Any

import msgspec
import torch

from datastore.checkpoint.format.manifest import RUN_KEY, PartInfo, RunInfo, StepCommit, StepRef, info_key, step_key
from datastore.checkpoint.loading.restore import Restored, Restorer
from datastore.checkpoint.places.holding import (
    Found,
    HeldPart,
    HeldStep,
    Holding,
    SpreadStorage,
    clear,
    fetch_parts,
    keepers,
    newest_whole,
)
from datastore.checkpoint.places.peers import Move, Peers
from datastore.checkpoint.ranks import SavingRank, check_step, writer
from datastore.checkpoint.saving.commit import build_commit
from datastore.checkpoint.saving.saver import Handle
from datastore.checkpoint.saving.snapshot import BufferPool, Snapshot, capture
from datastore.checkpoint.saving.write import Known, Staged, describe_share, digests_of, share_header, stage
from datastore.checkpoint.steps import CheckpointerSettings, Closing
from datastore.document import Document, seal, unseal
from datastore.errors import ConflictError, CorruptError, DatastoreError, ResumeError, WaitError
from datastore.host import utc_now
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.threads import in_thread

__all__ = ["MemoryCheckpointer"]


class Opening(Document, frozen=True, kw_only=True):
    """What a rank says when it begins to save; what rank 0 says of names and time is taken."""

    step: int
    save_id: str
    run_id: str
    time: str
    writer: str


class MemoryCheckpointer(Closing):
    """Keeps the newest step of a training program in the memory of its ranks, each part with two of them."""

    def __init__(self, group: Any, *, timeout_s: float = 600.0, threads: int = 2) -> None:
        """Use `group`, a gloo process group that nothing else uses, of all ranks that hold the state.

        `timeout_s` bounds how long a rank waits for another one, `threads` copy and hash. Nothing is sent before the first save.

        Raises:
            ConfigError: the group is another one, that of the whole program, or has one rank.
        """
        self._options = CheckpointerSettings(wait_s=timeout_s, threads=threads)
        self._peers = Peers(group, timeout_s=timeout_s)
        self._storage = MemoryStorage(f"steps-{uuid.uuid4().hex}")
        self._run_id = uuid.uuid4().hex
        self._own, self._others = BufferPool(), BufferPool()
        self._whole: HeldStep | None = None
        self._coming: HeldStep | None = None
        """A step that is being saved, or could not be saved to its end: with the others it may be whole."""

        self._flight: Handle | None = None
        self._job: Future[None] | None = None
        self._broken: WaitError | None = None

    @property
    def storage(self) -> Storage:
        """The newest whole step as this rank has it: all documents, its own part and that of the rank before it. To be read while no save is in flight."""
        return self._storage

    def latest(self) -> int | None:
        """Return the newest step that this rank knows to be whole, or None if there is none."""
        return None if self._whole is None else self._whole.commit.step

    def save(self, step: int, items: Mapping[str, Any]) -> Handle:
        """Save `items` as `step` and return at once; the work is done in the background. All ranks save the same steps.

        `items` are those of `Checkpointer.save`. Their tensors must not change until the handle is `staged`: put `guard` around what changes them.
        `handle.committed()` waits until each part is in the memory of two ranks. If the save before this one has not ended, this waits for it.

        Raises:
            ConfigError: something in `items` cannot be stored; the message has its path.
            ConflictError: `step` is not after the last one.
            WaitError: another rank has gone, or was late, in this save or before; the last whole step is intact.
            DatastoreError: the save before this one failed, which has not been raised yet.
        """
        self._settle()
        self._raise_broken()
        step = check_step(step)
        if self._whole is not None and step <= self._whole.commit.step:
            hint = "Number steps upwards; to go back, restore."
            raise ConflictError("this step is not after the last one", step=step, last=self.latest(), hint=hint)
        snapshot = capture(items, rank=self._peers.rank, world=self._peers.world)
        handle = self._flight = Handle(step, snapshot.size_bytes)
        self._job = in_thread(lambda: handle.run(bind(self._work, step, snapshot)))
        return handle

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Enter when no save is copying: `with memory.guard(): optimizer.step()`."""
        if self._flight is not None:
            self._flight.wait_staged()
        yield

    def _work(self, step: int, snapshot: Snapshot, staged: Callable[[], None]) -> StepCommit:
        self._coming = None
        try:
            share, own = self._stage(step, snapshot)
            staged()
            coming = self._coming = self._announced(step, snapshot, share, own)
            self._replicated(coming)
        except BaseException as error:
            if not isinstance(error, ConflictError | CorruptError):  # Which all ranks raise together.
                self._give_up(error)
            raise
        self._adopt(coming)
        return coming.commit

    def _stage(self, step: int, snapshot: Snapshot) -> tuple[Staged, HeldPart]:
        """Return the share of this rank, and the part that it lies in behind room for the header."""
        lead = len(share_header(snapshot.pieces, run_id=self._run_id, step=step)) if snapshot.pieces else 0
        share = stage(snapshot, Known(), self._own, threads=self._options.threads, copy=True, lead_bytes=lead)
        buffer = torch.empty(0, dtype=torch.uint8) if share.buffer is None else share.buffer
        return share, HeldPart(buffer[: lead + share.size_bytes], buffer, self._own)

    def _announced(self, step: int, snapshot: Snapshot, share: Staged, own: HeldPart) -> HeldStep:
        """Return the step with the documents of all ranks, and this rank's own part.

        Raises:
            ConflictError: the ranks hold different state, or save different steps.
        """
        opening = self._opened(step)
        ref = StepRef(step=step, save_id=opening.save_id)
        self._run_id = opening.run_id
        if share.fresh:
            header = share_header((item for item, _ in share.fresh), run_id=self._run_id, step=step)
            own.data.numpy()[: len(header)] = memoryview(header)
        member, digests = self._member, digests_of(share)
        info = describe_share(member, self._run_id, ref, snapshot=snapshot, staged=share, digests=digests)
        documents = dict(
            zip((info_key(ref, i) for i in range(member.world)), self._peers.gather(seal(info)), strict=True)
        )
        infos = [unseal(PartInfo, raw, where=key) for key, raw in documents.items()]
        before = None if self._whole is None else self._whole.commit.ref
        made = build_commit(member, infos, parent=before, items=snapshot.items, metrics={})
        raw = seal(msgspec.structs.replace(made, time=opening.time, writer=opening.writer))
        run = RunInfo(run_id=self._run_id, created=opening.time, exclusive=True, writer=opening.writer)
        files = {RUN_KEY: seal(run), step_key(step): raw, **documents}
        parts = {member.rank: own} if info.part else {}
        return HeldStep(unseal(StepCommit, raw, where=step_key(step)), files, parts)

    def _opened(self, step: int) -> Opening:
        mine = Opening(step=step, save_id=uuid.uuid4().hex[:16], run_id=self._run_id, time=utc_now(), writer=writer())
        said = [msgspec.json.decode(raw, type=Opening) for raw in self._peers.gather(msgspec.json.encode(mine))]
        steps = [each.step for each in said]
        if len(set(steps)) > 1:
            raise ConflictError("the ranks save different steps", steps=steps, hint="Save the same step on all ranks.")
        return said[0]

    def _replicated(self, coming: HeldStep) -> None:
        """Send this rank's part to the next rank, receive that of the one before, and return when all ranks have done so.

        Raises:
            CorruptError: what some rank received is not what was sent.
        """
        rank, world = self._peers.rank, self._peers.world
        after, before = (rank + 1) % world, (rank - 1) % world
        sends = [Move(after, rank, part.data) for part in coming.parts.values()]
        wanted = [(before, before)] if coming.commit.parts[before].part else []
        fetch_parts(self._peers, coming, sends, wanted, self._others)

    def _adopt(self, step: HeldStep) -> None:
        """Let `step`, which is whole, be the newest; let go the one before it."""
        before, self._whole, self._coming = self._whole, step, None
        step.publish(self._storage)
        if before is not None and before is not step:
            before.release()

    def restore(
        self, items: Mapping[str, Any], *, group: Any = None, partial: bool = False, fresh: bool = False
    ) -> Restored:
        """Load the newest step that is whole in the memory of the ranks into `items`, verified, all of it or nothing; then all parts are with two ranks again.

        After ranks have died pass the new `group`: of those that live on, and of as many new ones as you have, each at whatever place. A new one
        has made its own `MemoryCheckpointer` with it. All ranks call this. `partial` and `fresh` are those of `Checkpointer.restore`.

        Raises:
            MissingError: no step is whole, because two neighbours have died; or none was saved.
            ResumeError: what is saved does not fit; the message lists the differences.
            CorruptError: memory has changed since the step was saved; restore from storage.
            WaitError: another rank did not take part in time.
        """
        if group is not None:
            peers = Peers(group, timeout_s=self._options.wait_s)
            self._peers.abort()  # A save that waits there need not wait longer.
        if self._job is not None:
            wait([self._job])
        self._flight = None
        if group is not None:
            self._peers, self._broken = peers, None
        self._raise_broken()
        try:
            return self._restored(items, partial=partial, fresh=fresh)
        except WaitError as error:
            self._give_up(error)
            raise

    def _restored(self, items: Mapping[str, Any], *, partial: bool, fresh: bool) -> Restored:
        found = newest_whole(self._gathered())
        step = self._documents_of(found)
        storage = SpreadStorage(self._storage, step.commit)
        before = frozenset(step.parts)

        def prepare() -> tuple[Restorer, set[int]]:
            restorer = Restorer(
                self._member, items, places=[storage], agree=self._peers.least, partial=partial, fresh=fresh
            )
            documents = [step.document(rank) for rank in range(step.commit.world)]
            return restorer, restorer.needs(step.commit, documents)

        try:
            restorer = self._supplied(step, found, prepare)
            step.publish(self._storage)
            restored, _ = restorer.exactly(step.commit.step)
        except BaseException:
            step.release(but=before)
            self._show()
            raise
        step.release(but={part for part in step.parts if self._peers.rank in keepers(part, self._peers.world)})
        self._run_id = step.commit.run_id
        self._adopt(step)
        return restored

    def _gathered(self) -> list[list[Holding]]:
        """Return what each rank has."""
        mine = [step.holding for step in (self._whole, self._coming) if step is not None]
        said = self._peers.gather(msgspec.json.encode(mine))
        return [msgspec.json.decode(raw, type=list[Holding]) for raw in said]

    def _documents_of(self, found: Found) -> HeldStep:
        """Return the step with all its documents and what this rank has of its parts; who has none is told by one that has."""
        step = next((step for step in (self._whole, self._coming) if step is not None and step.key == found.key), None)
        if len(found.knowing) < self._peers.world:
            tells = found.knowing[0]
            raw = msgspec.msgpack.encode(step.files) if step is not None and tells == self._peers.rank else b""
            files = msgspec.msgpack.decode(self._peers.share(raw, tells), type=dict[str, bytes])
            key = step_key(found.key[0])
            step = step or HeldStep(unseal(StepCommit, files[key], where=key), files)
        assert step is not None
        return step

    def _supplied(self, step: HeldStep, found: Found, prepare: Callable[[], tuple[Restorer, set[int]]]) -> Restorer:
        """Bring the parts here that the items need or that this rank is to hold; return what loads them.

        Raises:
            ResumeError: on some rank the items do not fit.
            CorruptError: what some rank received is not what was sent.
        """
        rank, world = self._peers.rank, self._peers.world
        restorer, failure, missing = None, None, None
        try:
            restorer, needed = prepare()
            duty = {part for part in found.holders if rank in keepers(part, world)}
            missing = sorted(((needed & found.holders.keys()) | duty) - step.parts.keys())
        except DatastoreError as error:  # The others must not wait for this rank.
            failure = error
        said = [msgspec.json.decode(raw) for raw in self._peers.gather(msgspec.json.encode(missing))]
        if restorer is None or None in said:
            raise failure or ResumeError("another rank could not restore this step", hint="See its message.")
        sends = [
            Move(other, part, step.parts[part].data)
            for other, parts in enumerate(said)
            for part in parts
            if found.source(part, other) == rank
        ]
        fetch_parts(self._peers, step, sends, [(part, found.source(part, rank)) for part in said[rank]], self._others)
        return restorer

    def _show(self) -> None:
        """Have the storage hold the newest whole step."""
        if self._whole is None:
            clear(self._storage)
        else:
            self._whole.publish(self._storage)

    def close(self) -> None:
        """Wait for what is in flight, and give back the memory: what was saved is gone.

        Raises:
            DatastoreError: the last save failed, which has not been raised yet.
        """
        try:
            self._settle()
        finally:
            self._whole = self._coming = None
            clear(self._storage)
            self._own.clear()
            self._others.clear()

    @property
    def _member(self) -> SavingRank:
        return SavingRank(self._storage, self._peers.rank, self._peers.world, "memory", self._options)

    def _settle(self) -> None:
        """Wait until no save is in flight; raise what has not been raised yet."""
        if self._job is not None:
            wait([self._job])
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.raise_unheard()

    def _give_up(self, error: BaseException) -> None:
        """Leave the group, which is of no use any more, so that others who wait for this rank hear of it."""
        hint = "Make a new group, and call `restore(items, group=...)`."
        self._broken = (
            error if isinstance(error, WaitError) else WaitError("this rank left", reason=str(error), hint=hint)
        )
        self._peers.abort()

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise WaitError(self._broken.fact, hint=self._broken.hint, **self._broken.values)

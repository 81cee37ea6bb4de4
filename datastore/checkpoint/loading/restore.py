"""A step back into a running program: verified as a whole before anything is overwritten, or not at all.

    1. The ranks agree on the newest step that all of them see.
    2. Each rank reads the documents (of many, those that it needs), compares what is saved with what is there (both ways, no cast, all differences
       in one error), and verifies every chunk that it needs.
    3. They vote, also on whether they mean the same save. One no is enough: everybody takes the step before, loudly.
    4. Only now are tensors written, and verified again on the way; then a last vote, as a disk may give other bytes
       the second time. If it fails, what is in memory is damaged until an earlier step has been loaded.

What is asked for by number is never replaced by another step.

A run may have a second place. The newest step of either is taken, and what is damaged or gone in the first is read from the second.

A program that has just started has nothing to lose, and says so (`fresh`): then chunks are verified once, as they arrive in the
tensors, and the first vote is on the documents alone. If a chunk is bad the step before is loaded over what is there; if no step
is sound, the error says that the state is damaged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from time import perf_counter
from typing import Any, TypeAlias, TypeVar

import torch

from datastore.checkpoint.format.checks import PlacedBox
from datastore.checkpoint.format.layout import layout_of, ranks_holding
from datastore.checkpoint.format.manifest import PartInfo, StepCommit
from datastore.checkpoint.format.tree import specs, unpack
from datastore.checkpoint.items import check_items
from datastore.checkpoint.loading.reader import Reader, transfers_of
from datastore.checkpoint.loading.shared import Detour, contradictions, detours, fill, untied
from datastore.checkpoint.loading.targets import RestoreTarget, target_of
from datastore.checkpoint.ranks import Agree, SavingRank, all_equal
from datastore.checkpoint.steps import Damaged, StepLog, WholeStep, steps_of
from datastore.checkpoint.tensors import local_piece
from datastore.errors import ConflictError, CorruptError, DatastoreError, MissingError, ResumeError
from datastore.storage.base import Storage

__all__ = ["Restored", "Restorer"]

T = TypeVar("T")

Damage: TypeAlias = CorruptError | MissingError

Destinations: TypeAlias = dict[str, dict[str, torch.Tensor]]
"""Tensors to fill, by item and name."""

_LOGGER = getLogger(__name__)

_SHOWN = 20
"""How many differences one error lists."""

_FAILED, _DAMAGED, _SOUND = 0, 1, 2
"""What a rank votes; the least counts."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was loaded."""

    step: int
    save_id: str
    metrics: dict[str, Any]
    time: str
    session: str
    world: int
    """How many ranks saved it."""

    fell_back: tuple[Damaged, ...] = ()
    """Newer steps that could not be used; empty if all is well."""

    url: str = ""
    """Where it was read: of two places the second, if the first does not have it whole."""

    size_bytes: int = 0
    """What this rank read."""

    seconds: float = 0.0

    @property
    def passed_over(self) -> tuple[str, ...]:
        """The newer steps that could not be used, in a sentence each."""
        return tuple(map(str, self.fell_back))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A step that this rank has verified, and where its tensors go."""

    whole: WholeStep
    url: str
    reader: Reader
    beside: list[Detour]
    """Tensors that share memory: their values have been read already."""

    destinations: Destinations
    size_bytes: int


class Restorer:
    """Loads steps into the items of one rank, from the first of `places` that has them whole. All ranks make the same calls."""

    def __init__(
        self,
        member: SavingRank,
        items: Mapping[str, Any],
        *,
        places: Sequence[Storage],
        agree: Agree,
        partial: bool,
        fresh: bool = False,
    ) -> None:
        self._member = member
        self._places = places
        check_items(items)
        self._targets = [target_of(name, item, member.rank) for name, item in items.items()]
        self._agree = agree
        self._partial = partial
        self._fresh = fresh
        self._spoiled = False
        """Whether a step that turned out to be damaged is partly in the items."""

    def newest(self) -> tuple[Restored, WholeStep]:
        """Load the newest step that every rank can verify.

        Raises:
            MissingError: the run has no step.
            CorruptError: no step is sound.
            ResumeError: what is saved does not fit the items; nothing was written.
            ConflictError: the ranks see different saves of one step.
        """
        passed: list[Damaged] = []
        while True:
            step = self._agree(self._newest_before(passed))
            if step < 0:
                raise self._nothing_left(passed)
            found, error = self._attempt(step)
            if found is not None:
                restored, whole = found
                return replace(restored, fell_back=tuple(passed)), whole
            passed.append(Damaged(step, str(error)))
            _LOGGER.warning("STEP %d OF %s IS DAMAGED, falling back to the step before: %s", step, self._url, error)

    def exactly(self, step: int) -> tuple[Restored, WholeStep]:
        """Load `step`.

        Raises:
            MissingError: there is no such step.
            CorruptError: it is damaged.
            ResumeError: what is saved does not fit the items; nothing was written.
            ConflictError: the ranks see different saves of the step.
        """
        found, error = self._attempt(step)
        if found is None and self._fresh and self._spoiled:
            hint = "What is in memory is partly overwritten: restore another step before you use it."
            raise CorruptError(error.fact, hint=hint, **error.values)
        if found is None:
            raise error
        return found

    def needs(self, commit: StepCommit, parts: Sequence[PartInfo]) -> set[int]:
        """Return the ranks whose parts have what the items take of a step; `parts` are all its documents.

        Raises:
            ResumeError: what is saved does not fit the items.
        """
        return ranks_holding(layout_of(commit.ref, parts), _boxes(_flat(self._destinations(commit))))

    @property
    def _url(self) -> str:
        return self._places[0].url

    def _newest_before(self, passed: list[Damaged]) -> int:
        return max((step for step in steps_of(self._places) if not passed or step < passed[-1].step), default=-1)

    def _nothing_left(self, passed: list[Damaged]) -> DatastoreError:
        if not passed:
            return MissingError("the run has no checkpoint", url=self._url, hint="Check the URL, or start anew.")
        reasons = [f"step {damaged.step}: {damaged.reason}" for damaged in passed]
        hint = "Restore the files named from a copy."
        if self._spoiled:
            hint += " What is in memory is partly overwritten: start again before you use it."
        return CorruptError("no checkpoint of the run is sound", url=self._url, steps=reasons, hint=hint)

    def _attempt(self, step: int) -> tuple[tuple[Restored, WholeStep] | None, Damage]:
        """Return what was loaded, or None and what is wrong with the step on some rank, in the first place that has it."""
        errors: list[Damage] = []
        for place in self._places:
            found, error = self._attempt_in(place, step)
            if found is not None:
                if errors:
                    _LOGGER.warning("step %d is read from %s: %s", step, place.url, errors[0])
                return found, error
            errors.append(error)
        return None, next((error for error in errors if not isinstance(error, MissingError)), errors[0])

    def _attempt_in(self, place: Storage, step: int) -> tuple[tuple[Restored, WholeStep] | None, Damage]:
        begun = perf_counter()
        plan, error = self._together(lambda: self._verified(place, step))
        if plan is None:
            return None, error
        commit = plan.whole.commit
        if not all_equal(self._agree, int(commit.save_id[:15], 16)):
            hint = "Another process group is saving to this run; stop it."
            raise ConflictError("the ranks see different saves of one step", step=step, save=commit.save_id, hint=hint)
        done, error = self._together(lambda: self._loaded(plan))
        self._spoiled |= done is None
        if done is None and self._fresh:
            return None, error
        if done is None:
            fact = f"the state in memory is partly overwritten by a step that changed while it was read: {error.fact}"
            _LOGGER.error("%s", fact)
            return None, CorruptError(fact, hint="Restore another step before you use it.", **error.values)
        metrics = unpack(commit.metrics, name="metrics", tensors={})
        restored = Restored(step, commit.save_id, metrics, commit.time, commit.session, commit.world, url=plan.url)
        return (replace(restored, size_bytes=plan.size_bytes, seconds=perf_counter() - begun), plan.whole), error

    def _together(self, work: Callable[[], T]) -> tuple[T | None, Damage]:
        """Do `work` on all ranks; return its result if all succeeded, else None and what was found damaged."""
        result: T | None = None
        error: Damage = CorruptError("another rank found this step damaged", hint="See its message.")
        try:
            result = work()
            vote = _SOUND
        except (CorruptError, MissingError) as damage:
            error, vote = damage, _DAMAGED
        except Exception:
            self._agree(_FAILED)  # The others must not wait for this rank.
            raise
        verdict = self._agree(vote)
        if verdict == _FAILED:
            raise ResumeError("another rank could not restore this step", hint="See its message.")
        return (result if verdict == _SOUND else None), error

    def _verified(self, place: Storage, step: int) -> _Plan:
        """Return the plan for `step`; nothing has been written, and unless all is fresh, every byte this rank needs has been verified."""
        whole, destinations = self._described(place, step)
        flat = _flat(destinations)
        beside = detours(flat)
        apart = {detour.name: detour.beside for detour in beside}
        direct = {name: tensor for name, tensor in flat.items() if name not in apart}
        self._refuse(untied(direct, whole.parts), step)
        reader, more = self._reader(place, direct, whole), self._reader(place, apart, whole)
        reader.fetch()
        more.fetch()
        if not self._fresh:
            reader.verify()
            more.verify()
        more.deliver()  # Into tensors of its own.
        self._refuse(contradictions(beside), step)
        return _Plan(whole, place.url, reader, beside, destinations, reader.size_bytes + more.size_bytes)

    def _described(self, place: Storage, step: int) -> tuple[WholeStep, Destinations]:
        """Return what the documents say that this rank needs, and where the tensors of the step go."""
        log = StepLog(place)
        commit = log.read(step)
        layout = log.read_layout(commit)
        if layout is None:  # The documents vouch for what memory is set aside for.
            return log.read_parts(commit), self._destinations(commit)
        destinations = self._destinations(commit)
        ranks = ranks_holding(layout, _boxes(_flat(destinations)))
        if commit.world == self._member.world:
            ranks.add(self._member.rank)  # What this rank would write again.
        return log.read_parts(commit, ranks), destinations

    def _destinations(self, commit: StepCommit) -> Destinations:
        self._refuse(self._problems(commit), commit.step)
        return {target.key: target.destinations(commit.items[target.key]) for target in self._targets}

    def _reader(self, place: Storage, tensors: dict[str, torch.Tensor], whole: WholeStep) -> Reader:
        transfers = transfers_of(tensors, whole.parts)
        read = {transfer.entry.part for transfer in transfers}
        for info in whole.parts:
            if info.part in read:
                StepLog(place).check_header(info)
        return Reader(place, transfers, threads=self._member.options.threads)

    def _problems(self, commit: StepCommit) -> list[str]:
        wanted = {target.key for target in self._targets}
        found = [f"{name}: expected, but not saved" for name in sorted(wanted - commit.items.keys())]
        if not self._partial:
            extra = sorted(name for name in commit.items.keys() - wanted if self._is_ours(name))
            found += [f"{name}: saved, but not expected (pass partial=True to leave it)" for name in extra]
        for target in self._targets:
            if target.key in commit.items:
                found += target.problems(commit.items[target.key])
        return found

    def _is_ours(self, name: str) -> bool:
        """Return whether a saved item concerns this rank: what others saved for themselves does not."""
        base, _, rank = name.partition("@")
        return not rank or (int(rank) == self._member.rank and bool(base))

    def _refuse(self, problems: list[str], step: int) -> None:
        if problems:
            shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
            hint = "Nothing was loaded. Build the program's state as it was when this step was saved."
            raise ResumeError("the checkpoint does not fit", step=step, differences=shown, hint=hint)

    def _loaded(self, plan: _Plan) -> bool:
        items = plan.whole.commit.items
        # What has no tensors goes first: if it refuses, no tensor has been touched.
        plain = [target for target in self._targets if not any(specs(items[target.key], name=target.key))]
        for target in plain:
            self._accept(target, plan)
        plan.reader.deliver()
        fill(plan.beside)
        for target in self._targets:
            if target not in plain:
                self._accept(target, plan)
        return True

    def _accept(self, target: RestoreTarget, plan: _Plan) -> None:
        try:
            target.accept(plan.whole.commit.items[target.key], plan.destinations[target.key])
        except (CorruptError, MissingError) as error:
            # An item that misses something of its own, such as its dataset: no other step would help.
            raise ResumeError(
                f"an item cannot take its state: {error.fact}", item=target.key, hint=error.hint
            ) from error


def _flat(destinations: Destinations) -> dict[str, torch.Tensor]:
    return {name: tensor for tensors in destinations.values() for name, tensor in tensors.items()}


def _boxes(tensors: Mapping[str, torch.Tensor]) -> dict[str, PlacedBox]:
    """Return the box of each tensor that is in this process."""
    boxes = {name: local_piece(tensor, name).box for name, tensor in tensors.items()}
    return {name: (box.starts, box.shape) for name, box in boxes.items()}

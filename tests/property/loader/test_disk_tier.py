"""The disk of a cache as a state machine: two processes' tiers on one folder, damage, kills and a full disk, against a model."""

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from datastore.digest import digest_bytes
from datastore.loader.cache.disk import DiskTier, batch_name, block_name
from datastore.loader.cache.folder import CacheFolder, clear_cached, list_cached

UUIDS = ("a" * 32, "b" * 32)
BUDGET = 10_000
SIZES = (1_000, 1_500, 4_000, 7_000)

numbers = st.integers(0, 11)
tiers = st.integers(0, 1)


class KilledError(BaseException):
    """What stands for SIGKILL: nothing that would tidy up is run."""


def name_of(number: int) -> str:
    return (block_name if number % 2 else batch_name)("c" * 32, number)


def data_of(number: int) -> bytes:
    return bytes([number + 1]) * SIZES[number % len(SIZES)]


class TierMachine(RuleBasedStateMachine):
    """The model is the set of names that may be there, by dataset: eviction, damage and kills only ever take away from it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.may: list[set[int]] = [set(), set()]
        self.start(0)
        self.start(1)

    def tier(self, which: int) -> DiskTier:
        disk = DiskTier(self.root, budget_bytes=BUDGET, uuid=UUIDS[which], url=f"memory://{which}")
        disk.next_uses = (lambda names: [len(name) for name in names]) if which else None
        return disk

    @rule(which=tiers)
    def start(self, which: int) -> None:
        disk = self.tier(which)
        if which == 0:
            self.first = disk
        else:
            self.second = disk

    def of(self, which: int) -> DiskTier:
        return self.second if which else self.first

    @rule(which=tiers, number=numbers)
    def write(self, which: int, number: int) -> None:
        disk, name = self.of(which), name_of(number)
        was = disk.has(name)
        assert disk.write(name, memoryview(data_of(number))) == (not was)
        self.may[which].add(number)
        assert disk.has(name)

    @rule(which=tiers, number=numbers)
    def read(self, which: int, number: int) -> None:
        target = bytearray(len(data_of(number)))
        right = digest_bytes(data_of(number))
        there = self.of(which).read(name_of(number), memoryview(target), digest=right)
        assert there == (digest_bytes(target) == right)
        assert not there or number in self.may[which]
        assert self.of(which).has(name_of(number)) == there

    @rule(which=tiers, number=numbers, at=st.integers(0, 999), cut=st.booleans())
    def damage(self, which: int, number: int, at: int, *, cut: bool) -> None:
        path = self.root / UUIDS[which] / name_of(number)
        if path.exists():
            data = bytearray(path.read_bytes())
            data[at] ^= 0xFF
            path.write_bytes(data[:at] if cut else data)
            target = bytearray(len(data_of(number)))
            assert not self.of(which).read(name_of(number), memoryview(target), digest=digest_bytes(data_of(number)))
            assert not path.exists()

    @rule(which=tiers, number=numbers, half=st.booleans())
    def kill_in_the_middle_of_a_write(self, which: int, number: int, *, half: bool) -> None:
        """The process dies in the middle of a write: with bytes written and no more done, the lock gone with it."""
        disk = self.of(which)

        def die(path: str, data: memoryview) -> None:
            if half:
                Path(path).parent.mkdir(exist_ok=True)
                Path(f"{path}.tmp").write_bytes(data[: len(data) // 2])
            raise KilledError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datastore.loader.cache.folder._write", die)
            # What a living process would do on its way out is not done.
            patch.setattr("datastore.loader.cache.disk._undo", lambda *_: None)
            with suppress(KilledError):
                disk.write(name_of(number), memoryview(data_of(number)))
        self.start(which)

    @rule(which=tiers, number=numbers)
    def the_disk_is_full(self, which: int, number: int) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk = self.of(which)
        before = disk.has(name_of(number))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", full)
            assert not disk.write(name_of(number), memoryview(data_of(number)))
        assert disk.has(name_of(number)) <= before
        self.start(which)  # Which is what a minute would do.

    @rule(which=tiers)
    def clear(self, which: int) -> None:
        clear_cached(self.root, uuid=UUIDS[which])
        self.may[which].clear()
        assert UUIDS[which] not in {found.uuid for found in list_cached(self.root)}

    @invariant()
    def the_budget_holds(self) -> None:
        sizes = [path.stat().st_size for path in self.root.rglob("*-[br]*")]
        assert sum(sizes) <= BUDGET

    @invariant()
    def the_ledger_is_never_too_low(self) -> None:
        blocks = [path for path in self.root.rglob("*-[br]*") if path.suffix != ".tmp"]
        with CacheFolder(self.root).locked() as ledger:
            assert ledger is not None
            assert ledger.used_bytes >= sum(path.stat().st_size for path in blocks)

    def teardown(self) -> None:
        shutil.rmtree(self.root)


TierMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_disk_keeps_its_promises_in_any_order_of_events = TierMachine.TestCase

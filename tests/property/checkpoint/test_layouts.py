"""Random state in random shards, saved by some ranks and restored by others, into other shards: here as threads, each with a mesh of its own."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from datastore.checkpoint import steps
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.layout import StepLayout, layout_of, ranks_holding
from datastore.checkpoint.format.manifest import Entry, PartInfo, StepRef
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.replica import replicate
from datastore.checkpoint.saving import commit
from datastore.checkpoint.saving.snapshot import capture
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.checkpoint.tensors import Box, local_piece
from datastore.document import seal, unseal
from datastore.errors import CorruptError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.wrappers import WrappedStorage

T = TypeVar("T")
MESHES = ((1,), (2,), (3,), (4,), (2, 2), (1, 3), (4, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
STEP = 3


@dataclass(frozen=True)
class Layout:
    """How tensors lie on a mesh; a tensor without placements is a plain one that every rank holds."""

    sizes: tuple[int, ...]
    placements: dict[str, tuple[Placement, ...] | None]

    @property
    def world(self) -> int:
        return prod(self.sizes)

    def piece(self, name: str, whole: torch.Tensor, rank: int, *, filled: bool) -> torch.Tensor:
        placements = self.placements[name]
        if placements is None:
            return whole.clone() if filled else torch.zeros_like(whole)
        mesh = DeviceMesh("cpu", torch.arange(self.world).reshape(self.sizes), _init_backend=False, _rank=rank)
        local = self.local(name, whole, rank)
        local = local.clone() if filled else torch.zeros_like(local)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )

    def local(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """What torch's own `chunk` leaves for `rank`: mesh dimensions cut one after the other, strided ones last."""
        placements = self.placements[name] or (Replicate(),) * len(self.sizes)
        coordinate = torch.unravel_index(torch.tensor(rank), self.sizes)
        for i in sorted(range(len(self.sizes)), key=lambda i: isinstance(placements[i], _StridedShard)):
            placement = placements[i]
            if isinstance(placement, Shard | _StridedShard):
                pieces = whole.chunk(self.sizes[i], placement.dim)
                at = int(coordinate[i])
                whole = pieces[at] if at < len(pieces) else whole.narrow(placement.dim, 0, 0)
        return whole.contiguous()


def on_ranks(world: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


Truth = dict[str, torch.Tensor]


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    """Tensors of 0 to 3 dimensions, empty ones among them, of any bits."""
    found = {}
    for i in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        count = prod(shape) * dtype.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        raw = bytes(byte & 1 for byte in raw) if dtype == torch.bool else raw
        data = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[f"t{i}"] = data.reshape(shape)
    return found


@st.composite
def layouts(draw: st.DrawFn, truth: Truth) -> Layout:
    sizes = draw(st.sampled_from(MESHES))
    return Layout(sizes, {name: draw(placements(whole.dim(), sizes)) for name, whole in truth.items()})


def placements(dimensions: int, sizes: tuple[int, ...]) -> st.SearchStrategy[tuple[Placement, ...] | None]:
    one = st.sampled_from([Replicate(), *(Shard(i) for i in range(dimensions))])
    crossed = [(_StridedShard(i, split_factor=sizes[1]), Shard(i)) for i in range(dimensions) if len(sizes) == 2]
    choices = [st.none(), st.tuples(*[one] * len(sizes))]
    return st.one_of(*choices, *([st.sampled_from(crossed)] if crossed else []))


def tree(truth: Truth, layout: Layout, rank: int, *, filled: bool) -> dict[str, Any]:
    """The tensors at different depths, and plain values beside them."""
    found: dict[str, Any] = {"model": {"deep": {"er": []}, "flat": {}}, "data": {"cursor": 7 if filled else 0}}
    for i, (name, whole) in enumerate(truth.items()):
        tensor = layout.piece(name, whole, rank, filled=filled)
        found["model"]["deep"]["er"].append(tensor) if i % 2 else found["model"]["flat"].update({name: tensor})
    return found


def leaves(items: dict[str, Any], truth: Truth) -> dict[str, torch.Tensor]:
    names = list(truth)
    return {**items["model"]["flat"], **dict(zip(names[1::2], items["model"]["deep"]["er"], strict=True))}


def together(storage: Storage, layout: Layout, work: Callable[[Checkpointer, int], T]) -> list[T]:
    """Return what `work` returns on each rank of a new launch."""
    session, options = uuid.uuid4().hex, CheckpointerSettings(wait_s=60)

    def one(rank: int) -> T:
        with Checkpointer(storage, rank=rank, world=layout.world, session=session, options=options) as ck:
            return work(ck, rank)

    with ThreadPoolExecutor(layout.world) as pool:
        return list(pool.map(one, range(layout.world)))


def save(storage: Storage, truth: Truth, layout: Layout) -> None:
    def one(ck: Checkpointer, rank: int) -> None:
        ck.save(STEP, tree(truth, layout, rank, filled=True)).committed(timeout_s=60)

    together(storage, layout, one)


def check_all_is_back(storage: Storage, truth: Truth, layout: Layout) -> None:
    """Restore the step on all ranks, and compare each piece, bit for bit, with what torch's own `chunk` leaves of the whole."""

    def one(ck: Checkpointer, rank: int) -> None:
        items = tree(truth, layout, rank, filled=False)
        ck.restore(items, step=STEP)
        assert items["data"] == {"cursor": 7}
        for name, tensor in leaves(items, truth).items():
            found = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            expected = layout.local(name, truth[name], rank)
            assert found.shape == expected.shape, name
            assert bits(found).equal(bits(expected)), name

    together(storage, layout, one)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.fixture(params=["one list of all pieces", "the documents of all ranks"], autouse=True)
def from_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From how many ranks on a step has a layout: any number, or none."""
    ranks = 1 if request.param == "one list of all pieces" else 10**9
    monkeypatch.setattr(steps, "INDEXED_RANKS", ranks)
    monkeypatch.setattr(commit, "INDEXED_RANKS", ranks)
    return ranks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_some_ranks_saved_others_restore_into_their_own_shards(from_ranks: int, data: st.DataObject) -> None:
    truth = data.draw(truths(), label="state")
    saved = data.draw(layouts(truth), label="saved as")
    storage = MemoryStorage(uuid.uuid4().hex)
    save(storage, truth, saved)
    assert any(stat.key.endswith(".layout") for stat in storage.list("parts")) == (from_ranks <= saved.world)
    for _ in range(2):
        check_all_is_back(storage, truth, data.draw(layouts(truth), label="restored as"))


CROSSED = Layout(
    (2, 2), {"rows": (_StridedShard(0, split_factor=2), Shard(0)), "columns": (Shard(1), Shard(0)), "all": None}
)
ROWS = Layout((3,), {"rows": (Shard(0),), "columns": (Shard(0),), "all": None})
WHOLE = {
    "rows": torch.arange(7 * 5.0).reshape(7, 5),
    "columns": torch.arange(6 * 5).reshape(6, 5),
    "all": torch.ones(3),
}


@pytest.fixture
def run(tmp_path: Path, from_ranks: int) -> Path:
    assert from_ranks
    save(LocalStorage(tmp_path), WHOLE, CROSSED)
    return tmp_path


def files(run: Path) -> list[Path]:
    return sorted([*run.glob("parts/*"), *run.glob("steps/*")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_in_what_some_ranks_saved_is_found_by_others_or_changes_nothing(
    run: Path, data: st.DataObject
) -> None:
    damaged = data.draw(st.sampled_from(files(run)), label="file")
    original = damaged.read_bytes()
    position = data.draw(st.integers(0, 8 * len(original) - 1), label="bit")
    raw = bytearray(original)
    raw[position // 8] ^= 1 << position % 8
    damaged.write_bytes(raw)
    try:
        if damaged.suffix == ".layout":
            check_all_is_back(LocalStorage(run), WHOLE, ROWS)
        else:
            with pytest.raises(CorruptError):
                check_all_is_back(LocalStorage(run), WHOLE, ROWS)
    finally:
        damaged.write_bytes(original)


class Listening(WrappedStorage):
    """Tells which documents of ranks are read."""

    read: frozenset[int] = frozenset()

    def get(self, key: str) -> bytes:
        if key.startswith("parts/") and key.endswith(".json"):
            self.read |= {int(Path(key).stem.rpartition("-")[2])}
        return super().get(key)


def read_by(run: Path, layout: Layout) -> list[set[int]]:
    """Return the ranks whose documents each rank of `layout` reads to restore."""
    places = [Listening(LocalStorage(run)) for _ in range(layout.world)]

    def one(_: Checkpointer, rank: int) -> set[int]:
        items = tree(WHOLE, layout, rank, filled=False)
        with Checkpointer(places[rank], rank=rank, world=layout.world, session="reads") as ck:
            ck.restore(items, step=STEP, agree=lambda value: value)
        return set(places[rank].read)

    return together(LocalStorage(run), layout, one)


def test_a_rank_reads_the_documents_of_those_it_needs_something_of(run: Path, from_ranks: int) -> None:
    everything = [{0, 1, 2, 3}] * 4
    owner = 0  # Of the tensor that all ranks hold.
    assert read_by(run, CROSSED) == ([{rank, owner} for rank in range(4)] if from_ranks == 1 else everything)


@pytest.mark.parametrize("from_ranks", ["one list of all pieces"], indirect=True)
@pytest.mark.parametrize("lie", [{"save_id": "0" * 16}, {"world": 5}, {"tensors": {}}, {"cuts": ()}])
def test_a_list_of_pieces_that_is_not_that_of_the_step_is_passed_over(
    run: Path, lie: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    place = next(run.glob("parts/*.layout"))
    layout = unseal(StepLayout, place.read_bytes(), where="")
    place.write_bytes(seal(msgspec.structs.replace(layout, **lie)))
    check_all_is_back(LocalStorage(run), WHOLE, ROWS)
    assert "the documents of all ranks are read: the layout is not that of the step" in caplog.text


@pytest.mark.parametrize("from_ranks", ["one list of all pieces"], indirect=True)
def test_a_list_that_names_too_few_ranks_is_damage_and_nothing_is_touched(run: Path) -> None:
    place = next(run.glob("parts/*.layout"))
    layout = unseal(StepLayout, place.read_bytes(), where="")
    cuts = tuple(msgspec.structs.replace(cut, ranks=(0,) * len(cut.ranks)) for cut in layout.cuts)
    place.write_bytes(seal(msgspec.structs.replace(layout, cuts=cuts)))
    with pytest.raises(CorruptError, match="not saved as a whole"):
        check_all_is_back(LocalStorage(run), WHOLE, ROWS)


@pytest.mark.parametrize("from_ranks", ["one list of all pieces"], indirect=True)
def test_a_list_of_pieces_is_copied_with_its_step_and_goes_with_it(run: Path, tmp_path: Path) -> None:
    there = LocalStorage(tmp_path / "there")
    replicate(LocalStorage(run), there)
    assert [stat.key for stat in there.list("parts") if stat.key.endswith(".layout")]
    check_all_is_back(there, WHOLE, ROWS)
    with Checkpointer(there, keep=Keep(last=1)) as ck:
        items = tree(WHOLE, Layout((1,), dict.fromkeys(WHOLE)), 0, filled=False)
        ck.restore(items)
        items["model"]["flat"]["rows"] += 1
        items["model"]["flat"]["all"] += 1
        items["model"]["deep"]["er"][0] += 1
        ck.save(STEP + 1, items, blocking=True)
    assert len([stat.key for stat in there.list("parts") if stat.key.endswith(".layout")]) == 1


@given(layouts({"w": torch.zeros(5, 6)}), layouts({"w": torch.zeros(5, 6)}))
def test_the_ranks_that_hold_a_box_are_those_whose_boxes_meet_it(saved: Layout, wanted: Layout) -> None:
    numbers = torch.arange(30).reshape(5, 6)
    pieces = [
        capture({"m": {"w": saved.piece("w", numbers, rank, filled=True)}}, rank=rank, world=saved.world).pieces
        for rank in range(saved.world)
    ]
    boxes = {rank: piece.piece.box for rank, found in enumerate(pieces) for piece in found}
    infos = [info_of(rank, boxes.get(rank)) for rank in range(saved.world)]
    layout = layout_of(StepRef(step=1, save_id=""), infos)
    for rank in range(wanted.world):
        box = local_piece(wanted.piece("w", numbers, rank, filled=True), "w").box
        mine = set(wanted.local("w", numbers, rank).flatten().tolist())
        met = {
            other for other, found in boxes.items() if mine & set(saved.local("w", numbers, other).flatten().tolist())
        }
        assert ranks_holding(layout, {"m/w": (box.starts, box.shape)}) >= met
        assert not mine or ranks_holding(layout, {"m/w": (box.starts, box.shape)}) == met


def info_of(rank: int, box: Box | None) -> PartInfo:
    entry = (
        Entry(
            tensor="m/w",
            dtype="I64",
            global_shape=(5, 6),
            shape=box.shape,
            offsets=box.starts,
            part="",
            start=0,
            stop=0,
            digests="",
        )
        if box
        else None
    )
    return PartInfo(
        run_id="",
        step=1,
        save_id="",
        rank=rank,
        world=9,
        part="",
        size_bytes=0,
        data_start=0,
        header_digest="",
        chunk_bytes=1,
        entries=(entry,) if entry else (),
        items={},
        own_items={},
    )

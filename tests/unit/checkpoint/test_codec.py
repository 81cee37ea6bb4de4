"""Packed parts: the same tensors in fewer bytes, wherever they are read, and damage is found as in plain ones."""

import uuid
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.codec import PackedParts, pack, with_codec
from datastore.checkpoint.difference import difference
from datastore.checkpoint.dropping import drop_item
from datastore.checkpoint.exchange.files import read_items
from datastore.checkpoint.inspect import list_steps, verify_step
from datastore.checkpoint.keeping import Keep, collect
from datastore.checkpoint.places.two import TwoPlaces
from datastore.checkpoint.replica import replicate
from datastore.checkpoint.steps import CheckpointerSettings, StepLog
from datastore.errors import CorruptError, MissingError
from datastore.formats.safetensors import HeaderTensor, encode_header
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.resolve import open_storage

ZSTD = CheckpointerSettings(codec="zstd")

KEY = "parts/0000000001-0123456789abcdef-00000.safetensors"


def items(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    w = torch.randn(1500, 1000)
    model = {
        "w": w,
        "half": w[:300].bfloat16(),
        "doubles": torch.randn(7, 11, dtype=torch.float64),
        "small": torch.randn(3),
        "pairs": torch.randn(50, dtype=torch.complex64),
        "bytes": torch.arange(77, dtype=torch.uint8),
        "zeros": torch.zeros(5, 0),
        "frozen": torch.arange(9000),
    }
    return {"model": model, "optim": {"m": torch.randn(1000), "n": step}}


def blank() -> dict[str, Any]:
    return {
        name: {key: torch.zeros_like(v) if isinstance(v, torch.Tensor) else 0 for key, v in item.items()}
        for name, item in items(0).items()
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(left["model"][name], right["model"][name]) for name in right["model"])


@pytest.fixture
def run() -> MemoryStorage:
    storage = MemoryStorage(uuid.uuid4().hex)
    with Checkpointer(storage, keep=Keep(last=2), options=ZSTD) as ck:
        for step in (1, 2, 3):
            ck.save(step, items(step), blocking=True)
    return storage


def files(storage: MemoryStorage) -> list[str]:
    return [stat.key for stat in storage.list("parts") if not stat.key.endswith(".json")]


def test_packed_steps_are_read_by_everybody_who_is_told_nothing(run: MemoryStorage) -> None:
    assert files(run)
    assert all(key.endswith(".safetensors.packed") for key in files(run))
    with Checkpointer(run) as ck:
        assert ck.steps() == [2, 3]
        for fresh in (False, True):
            found = blank()
            ck.restore(found, step=2, fresh=fresh)
            assert same(found, items(2))
        assert not ck.verify(3).bad
    assert [step.step for step in list_steps(run)] == [2, 3]
    assert same(read_items(run, 3), items(3))
    assert difference((run, 2), (run, 3)).same == 3
    assert drop_item(run, "optim", steps=[2]).steps == (2,)
    assert not verify_step(run, 2).bad


def test_it_takes_fewer_bytes_and_the_next_save_points_into_it(run: MemoryStorage) -> None:
    raw = sum(
        tensor.nbytes for item in items(3).values() for tensor in item.values() if isinstance(tensor, torch.Tensor)
    )
    newest = next(
        stat.size_bytes for stat in run.list("parts") if "0000000003" in stat.key and stat.key.endswith("packed")
    )
    assert newest < 0.88 * raw
    with Checkpointer(run, keep=Keep(last=1)) as ck:  # Without the codec from here on.
        ck.restore(blank())
        ck.save(4, items(4), blocking=True)
        ck.gc()
        assert ck.steps() == [4]
        found = blank()
        ck.restore(found)
        assert same(found, items(4))
    # What never changes lies in the first part, which stays; the others have gone.
    assert [key[6:16] for key in files(run)] == ["0000000001", "0000000004"]
    assert files(run)[1].endswith(".safetensors")


def test_each_place_has_its_own_codec(tmp_path: Path) -> None:
    near, far, back = (tmp_path / name for name in ("near", "far", "back"))
    with Checkpointer(TwoPlaces(near, far, codec="zstd")) as ck:
        ck.save(1, items(1)).replicated()
    assert [path.suffix for path in (near / "parts").iterdir() if path.suffix != ".json"] == [".safetensors"]
    assert [path.suffix for path in (far / "parts").iterdir() if path.suffix != ".json"] == [".packed"]
    replicate(far, back)
    part = StepLog(open_storage(str(near))).read(1).parts[0].part
    assert (back / part).read_bytes() == (near / part).read_bytes()
    (near / part).unlink()
    found = blank()
    with Checkpointer(TwoPlaces(near, far)) as ck:
        assert ck.restore(found).url == str(far)
    assert same(found, items(1))


def test_collections_see_packed_parts_as_parts(run: MemoryStorage) -> None:
    gone = collect(run, Keep(last=1))
    assert gone.steps == (2,)
    assert any(key.startswith("parts/0000000002") for key in gone.keys)
    assert not any("0000000002" in key for key in files(run))
    assert not verify_step(run, 3).bad


@pytest.mark.parametrize("where", [0, 8, 30, 2000, 70_000, -3000])
def test_a_flipped_bit_anywhere_is_found(run: MemoryStorage, where: int) -> None:
    key = next(key for key in files(run) if "0000000003" in key)
    raw = bytearray(run.get(key))
    raw[where] ^= 4
    run.put(key, bytes(raw))
    assert verify_step(run, 3).bad
    found = blank()
    with Checkpointer(run) as ck:
        with pytest.raises(CorruptError):
            ck.restore(found, step=3)
        assert found["model"]["w"].abs().max() == 0
        assert ck.restore(found).step == 2


@pytest.mark.parametrize("left", [0, 5, 12, 300, 100_000])
def test_a_part_that_was_cut_short_is_damaged(run: MemoryStorage, left: int) -> None:
    key = next(key for key in files(run) if "0000000003" in key)
    run.put(key, run.get(key)[:left])
    assert verify_step(run, 3).bad
    with Checkpointer(run) as ck:
        assert ck.restore(blank()).step == 2


_KINDS = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(_KINDS)), st.integers(0, 700)), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_any_range_of_any_part_is_what_was_packed(
    shapes: list[tuple[str, int]], seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [HeaderTensor(f"t{i}", kind, (count,)) for i, (kind, count) in enumerate(shapes)]
    header = encode_header(tensors, metadata={})
    body = [
        torch.randint(0, data.draw(st.sampled_from([1, 3, 256])), (tensor.size_bytes,), generator=generator)
        .to(torch.uint8)
        .numpy()
        for tensor in tensors
    ]
    whole = header + b"".join(piece.tobytes() for piece in body)
    storage = PackedParts(MemoryStorage(uuid.uuid4().hex), "zstd")
    storage.put_new(KEY, header, *(piece.data for piece in body if len(piece)))
    assert storage.get(KEY) == whole
    assert storage.stat(KEY).size_bytes == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    reader = with_codec(storage.inner)
    target = bytearray(stop - start)
    reader.read_into(KEY, start, target)
    assert bytes(target) == whole[start:stop] == reader.get_ranges(KEY, [(start, stop)])[0]
    with pytest.raises(CorruptError, match="ends at"):
        reader.get_ranges(KEY, [(0, len(whole) + 1)])


def test_a_large_tensor_has_frames_that_are_the_chunks_of_its_digests() -> None:
    size = 9 * 2**20
    header = encode_header([HeaderTensor("t", "F32", (size // 4,)), HeaderTensor("u", "F32", (5,))], metadata={})
    storage = MemoryStorage(uuid.uuid4().hex)
    storage.put(KEY + ".packed", *pack([header, bytes(size), bytes(20)]))
    reader = with_codec(storage)
    assert reader.stat(KEY).size_bytes == len(header) + size + 20
    packed = reader._packed(KEY)  # type: ignore[attr-defined]
    assert [start - len(header) for start in packed.starts[1:]] == [0, 4 * 2**20, 8 * 2**20, size, size + 20]


def test_a_part_that_is_not_there_yet_is_found_when_it_is() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    reader = with_codec(storage)
    with pytest.raises(MissingError):
        reader.stat(KEY)
    storage.put(KEY, b"plain")
    assert reader.stat(KEY).size_bytes == 5
    assert reader.local_path(KEY) is None

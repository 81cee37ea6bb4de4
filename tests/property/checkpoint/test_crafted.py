"""Documents that lie with right digests: found before memory is set aside, before a byte is read twice, before state is touched."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.checkpoint import inspect as looking
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format import checks
from datastore.checkpoint.format.manifest import Entry
from datastore.checkpoint.format.tree import TensorSpec
from datastore.digest import digest_hex
from datastore.errors import CorruptError, FormatError, MissingError, ResumeError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.wrappers import WrappedStorage

STEP = 7
BEFORE = -1.0


def items(value: float) -> dict[str, Any]:
    tied = torch.full((6, 2), value)
    return {
        "model": {"again": tied, "none": torch.zeros(0, 3), "tied": tied, "w": torch.full((4, 3), value)},
        "data": {"cursor": value, "at": (1, math.nan), 5: [2**70, None]},
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    with Checkpointer(folder) as ck:
        ck.save(STEP, items(1.0), metrics={"loss": 1.5}, blocking=True)
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(pristine, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")


def sealed(document: dict[str, Any]) -> bytes:
    """The bytes of `document` with a digest that is right, whatever it says."""
    text = json.dumps(document | {"digest": ""}, indent=2)
    return text.replace('"digest": ""', f'"digest": "{digest_hex(text.encode())}"', 1).encode()


def change(run: Path, *, info: Callable[[Any], None] | None = None, step: Callable[[Any], None] | None = None) -> None:
    """Rewrite the documents of the step; digests, and those that name them, are right again."""
    place = next(run.glob("parts/*.json"))
    commit_place = next(run.glob("steps/*.json"))
    commit = json.loads(commit_place.read_bytes())
    if info is not None:
        document = json.loads(place.read_bytes())
        info(document)
        raw = sealed(document)
        place.write_bytes(raw)
        commit["parts"][0]["info_digest"] = json.loads(raw)["digest"]
    if step is not None:
        step(commit)
    commit_place.write_bytes(sealed(commit))


def check_it_is_refused(run: Path, match: str) -> None:
    target, empty = items(BEFORE), {"model": {}, "data": {}}
    with Checkpointer(run) as ck:
        for into in (target, empty):
            with pytest.raises(CorruptError, match=match):
                ck.restore(into, step=STEP)
        assert ck.verify(STEP).bad
    assert empty == {"model": {}, "data": {}}
    assert target["model"]["w"].unique().tolist() == [BEFORE]


def entry_of(name: str, **values: Any) -> Callable[[Any], None]:
    return lambda info: next(entry for entry in info["entries"] if entry["tensor"] == name).update(values)


def cut(entry: dict[str, Any]) -> None:
    entry |= {"shape": [2, 3], "stop": entry["start"] + 24}


DIGEST = "0" * 32

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "an entry with another dtype": ({"info": entry_of("model/w", dtype="U8")}, "not the 12 bytes"),
    "an entry that is half of its tensor": (
        {"info": lambda info: cut(next(entry for entry in info["entries"] if entry["tensor"] == "model/w"))},
        "did not write the whole of a tensor",
    ),
    "an entry of another whole": ({"info": entry_of("model/w", global_shape=[5, 3])}, "or not like this"),
    "an entry with too few dimensions": ({"info": entry_of("model/w", offsets=[0])}, "no box inside"),
    "an entry that reaches out of its tensor": ({"info": entry_of("model/w", offsets=[1, 0])}, "no box inside"),
    "an entry of a dtype nobody knows": ({"info": entry_of("model/w", dtype="F512")}, "not known"),
    "an entry in the header": ({"info": entry_of("model/w", start=0, stop=48)}, "outside of the data"),
    "an entry in no part": ({"info": entry_of("model/w", part="../../etc/passwd")}, "outside of the data"),
    "an entry in a part that is not named": (
        {"info": entry_of("model/w", part=f"parts/{'0' * 10}-{'0' * 16}-00000.safetensors")},
        "does not name a part",
    ),
    "an entry without digests": ({"info": entry_of("model/w", digests="")}, "one digest for each chunk"),
    "an entry with a digest per byte": (
        {"info": lambda info: (entry_of("model/w", digests=DIGEST * 48)(info), info.update(chunk_bytes=1))},
        "size of a chunk is out of range",
    ),
    "a chunk as large as memory": ({"info": lambda info: info.update(chunk_bytes=2**50)}, "out of range"),
    "ranges that overlap": ({"info": entry_of("model/w", start=4100, stop=4148)}, "overlap"),
    "one range with two digests": ({"info": entry_of("model/again", digests=DIGEST)}, "two sets of digests"),
    "an entry twice": ({"info": lambda info: info["entries"].append(info["entries"][0])}, "the same piece"),
    "a part of another rank": ({"info": lambda info: info.update(rank=3)}, "not of this step"),
    "a part of another step": ({"info": lambda info: info.update(step=3)}, "not of this step"),
    "a header longer than its part": ({"info": lambda info: info.update(data_start=2**40)}, "shorter than its header"),
    "a tensor as large as the world": (
        {"step": lambda commit: commit["items"]["model"]["w"].update(shape=[2**30, 2**29])},
        "or not like this",
    ),
    "more elements than there are numbers": (
        {"step": lambda commit: commit["items"]["model"]["none"].update(shape=[2**62, 2**62, 0])},
        "not a value of the kind 'tensor'",
    ),
    "a negative length": (
        {"step": lambda commit: commit["items"]["model"]["w"].update(shape=[-4, -3])},
        "kind 'tensor'",
    ),
    "a tensor without a dtype": ({"step": lambda commit: commit["items"]["model"]["w"].pop("dtype")}, "kind 'tensor'"),
    "a tensor that no part has": (
        {"step": lambda commit: commit["items"]["model"].update(v={"$": "tensor", "dtype": "F32", "shape": [2]})},
        "did not write the whole of a tensor",
    ),
    "a value of no kind": ({"step": lambda commit: commit["items"].update(data={"$": "code"})}, "kind 'code'"),
    "a number that is none": (
        {"step": lambda commit: commit["items"]["data"].update(pairs=[["n", {"$": "int", "value": "0xyz"}]])},
        "kind 'int'",
    ),
    "a map without pairs": ({"step": lambda commit: commit["items"].update(data={"$": "map"})}, "kind 'map'"),
    "an item that is a list": ({"step": lambda commit: commit["items"].update(data=[1])}, "no map"),
    "a key twice": (
        {"step": lambda commit: commit["items"].update(data={"$": "map", "pairs": [["a", 1], ["a", 2]]})},
        "key twice",
    ),
    "metrics with a tensor": (
        {"step": lambda commit: commit["metrics"].update(loss={"$": "tensor", "dtype": "F32", "shape": [2]})},
        "metrics hold a tensor",
    ),
    "more ranks than parts": ({"step": lambda commit: commit.update(world=10**9)}, "one for each rank"),
    "no parts": ({"step": lambda commit: commit.update(parts=[])}, "one for each rank"),
    "a part elsewhere": ({"step": lambda commit: commit["parts"][0].update(part="/dev/zero")}, "name of a part"),
    "a document elsewhere": ({"step": lambda commit: commit["parts"][0].update(info="../x")}, "name of a part"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_step_that_lies_is_corrupt_and_nothing_is_touched(run: Path, lie: str) -> None:
    documents, match = LIES[lie]
    change(run, **documents)
    check_it_is_refused(run, match)


def test_a_state_nested_deeper_than_any_that_is_saved_is_corrupt(run: Path) -> None:
    deep: Any = 1
    for _ in range(100):
        deep = {"a": deep}
    change(run, step=lambda commit: commit["items"].update(data=deep))
    check_it_is_refused(run, "nested too deeply")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


OTHERS = [-1, 0, 1, 3, 2**31, 2**62, 2**70, 1.5, "", "x", "F64", "F4_X2", DIGEST, None, True, [], [0], [2**40], {}]


def put(document: Any, path: tuple[Any, ...], other: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    if other is ...:
        del document[path[-1]]
    else:
        document[path[-1]] = other


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_one_value_says_the_step_is_restored_as_it_was_or_refused(
    pristine: Path, run: Path, data: st.DataObject
) -> None:
    which = data.draw(st.sampled_from(["info", "step"]))
    shutil.rmtree(run)
    shutil.copytree(pristine, run)
    document = json.loads(next(run.glob("parts/*.json" if which == "info" else "steps/*.json")).read_bytes())
    path = data.draw(st.sampled_from([path for path in places(document) if path != ("digest",)]))
    other = data.draw(st.sampled_from([*OTHERS, ...]))
    change(run, **{which: lambda found: put(found, path, other)})
    plain = path[0] in {"items", "metrics", "own_items"}  # A number that is another one is as good as the first.
    target, empty = items(BEFORE), {"model": {}, "data": {}}
    for into in (target, empty):
        try:
            with Checkpointer(run) as ck:
                ck.restore(into, step=STEP)
        except (CorruptError, FormatError, ResumeError, MissingError):
            assert into == empty or into["model"]["w"].unique().tolist() == [BEFORE]
        else:
            assert plain or into["model"]["w"].tolist() == [[1.0] * 3] * 4
            assert not looking.verify_step(LocalStorage(run), STEP).bad
    if path != ("format",):
        looking.list_steps(LocalStorage(run))


class Metered(WrappedStorage):
    """Counts the bytes that are read of parts."""

    read_bytes = 0

    def read_into(self, key: str, start: int, target: Any) -> None:
        self.read_bytes += memoryview(target).nbytes
        super().read_into(key, start, target)


def test_names_without_number_for_one_range_cost_one_read(run: Path) -> None:
    count = 30_000

    def tie(info: Any) -> None:
        first = next(entry for entry in info["entries"] if entry["tensor"] == "model/tied")
        info["entries"] += [first | {"tensor": f"model/n{i:06d}"} for i in range(count)]

    def tell(commit: Any) -> None:
        spec = commit["items"]["model"]["tied"]
        commit["items"]["model"] |= {f"n{i:06d}": spec for i in range(count)}

    change(run, info=tie, step=tell)
    storage = Metered(LocalStorage(run))
    begun = time.monotonic()
    assert not looking.verify_step(storage, STEP).bad
    assert storage.read_bytes == 6 * 2 * 4 + 4 * 3 * 4
    assert time.monotonic() - begun < 30


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
        found.append((starts, tuple(draw(st.integers(1, size - at)) for at, size in zip(starts, shape, strict=True))))
    return shape, found


@settings(max_examples=300)
@given(boxes())
def test_boxes_are_the_whole_exactly_if_every_element_is_in_one_of_them(
    found: tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]],
) -> None:
    shape, placed = found
    hits = torch.zeros(shape, dtype=torch.int64)
    for starts, lengths in placed:
        hits[tuple(slice(at, at + length) for at, length in zip(starts, lengths, strict=True))] += 1
    entries = [
        Entry(
            tensor="w",
            dtype="U8",
            global_shape=shape,
            shape=lengths,
            offsets=starts,
            part="",
            start=0,
            stop=0,
            digests="",
        )
        for starts, lengths in placed
    ]
    fault = checks.coverage_fault({"w": TensorSpec("U8", shape)}, entries)
    assert (fault is None) == bool((hits == 1).all())


def test_a_saved_run_passes_its_own_checks(pristine: Path) -> None:
    with Checkpointer(pristine) as ck:
        assert ck.verify(STEP).bad == ()
        assert ck.restore({"model": {}, "data": {}}).step == STEP

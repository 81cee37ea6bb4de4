"""A second reader, written from docs/format.md alone: it finds what the package finds, in any dataset.

`format_reader.py` uses nothing of the package; only the comparison does.
"""

import ast
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from datastore.dataset.durability.parity import protect
from datastore.dataset.log.manifest import oldest_readable
from datastore.dataset.log.tags import list_tags, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.clone import clone
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.copy import copy
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.roots import create_at, place_dataset
from datastore.dataset.shards.files import put_tokenizer, read_token_table, write_token_shard
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.formats.tokens import token_dtype
from datastore.ingestion.writers.records import record_writer
from datastore.testing.examples import documents_of, make_dataset

GOLDEN = Path(__file__).parents[2] / "schemas" / "golden" / "v1"
PROGRAM = Path(__file__).with_name("format_reader.py")


def reader(root: Path) -> Any:
    """Return the reader of the page, opened at `root`."""
    spec = importlib.util.spec_from_file_location("format_reader", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reader(root)


def documents(dataset: Dataset) -> list[dict[str, Any]]:
    """Return what the package says the live documents of a version are."""
    found = []
    for index, shard in enumerate(dataset.segments):
        table = read_token_table(dataset.storage, shard)
        live = dataset.live_rows(index)
        rows = list(range(shard.documents)) if live is None else np.flatnonzero(live).tolist()
        streams = {"tokens": table.values, **table.columns}
        for row, document in zip(rows, dataset.live_documents(index).to_pylist(), strict=True):
            span = slice(table.offsets[row], table.offsets[row + 1])
            found.append(document | {name: each[span].tolist() for name, each in streams.items()})
    return found


def same(root: Path) -> int:
    """Compare all readable versions and tags of the dataset at `root`; return how many versions there are."""
    second, newest = reader(root), open_dataset(root)
    assert second.newest() == newest.version
    oldest = oldest_readable(newest.info, newest.commit)
    for version in range(oldest, newest.version + 1):
        dataset, commit = open_dataset(root, version=version), second.commit(version)
        assert [shard["uid"].hex() for shard in second.shards(commit)] == [shard.uid for shard in dataset.segments]
        assert commit["totals"].get("deleted_documents", 0) == dataset.totals.deleted_documents
        if dataset.kind == "tokens":
            assert list(second.documents(commit)) == documents(dataset)
        else:
            assert second.records(commit).equals(dataset.to_arrow())
    for version in range(1, oldest):
        with pytest.raises(ValueError, match="expired"):
            second.commit(version)
    for tag in list_tags(newest.storage):
        assert second.tagged(tag)["version"] == open_dataset(root, tag=tag).version
    return newest.version - oldest + 1


def add(root: Path, name: int, *, columns: bool = False, dtype: str = "") -> None:
    """Append a shard of four documents."""
    storage, _ = create_at(root)
    tokenizer = put_tokenizer(storage, b"{}", vocab_size=2**16, end_of_text=0)
    uid, lengths = f"{name:032x}", [3, 0, 40, 7]
    values = (np.arange(sum(lengths)) * 7 + name).astype(dtype or token_dtype(2**16))
    beside: dict[str, npt.NDArray[Any]] = {
        "loss_mask": (values % 2).astype(np.uint8),
        "logits": np.ones((values.size, 3), np.float16),
    }
    shard = write_token_shard(
        storage,
        uid=uid,
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        documents=documents_of(f"{name:08x}{uid[8:]}", lengths),
        columns=beside if columns else {},
    )
    commit_shards(storage, [shard], tokenizer=tokenizer)


def id_of(name: int, row: int) -> str:
    return f"{name:08x}-{row}"


def test_it_is_short_and_imports_pyarrow_and_what_comes_with_python() -> None:
    text = PROGRAM.read_text()
    assert len(text.splitlines()) < 155
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert names <= {"pyarrow", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", ["tokens", "records"])
def test_the_golden_store(name: str) -> None:
    assert same(GOLDEN / name) >= 1


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_many_versions(tmp_path: Path, dtype: str) -> None:
    for index in range(12):
        make_dataset(tmp_path, [[index + 1, 0, 500], [7] * index], dtype=dtype, name=str(index))
    assert same(tmp_path) == 12


def test_a_shard_of_several_blocks(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[300_000] * 4])
    assert same(tmp_path) == 1


def test_a_hint_that_lags_and_one_that_is_gone(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[1]], name="a")
    hint = (tmp_path / "_log/_last").read_bytes()
    for name in "bcdefg":
        make_dataset(tmp_path, [[1]], name=name)
    (tmp_path / "_log/_last").write_bytes(hint)
    assert reader(tmp_path).newest() == 7
    (tmp_path / "_log/_last").unlink()
    assert reader(tmp_path).newest() == 7


@pytest.mark.parametrize("columns", [False, True])
def test_deletions_purges_and_what_compacting_makes_of_them(tmp_path: Path, *, columns: bool) -> None:
    for name in range(3):
        add(tmp_path, name, columns=columns)
    dataset = open_dataset(tmp_path, version=2)
    set_tag(dataset.storage, "two", dataset.commit)
    delete(tmp_path, ids=[id_of(0, 0), id_of(1, 3)])
    delete(tmp_path, ids=[id_of(0, 2)])
    assert same(tmp_path) == 5
    purge(tmp_path, drop_tags=True)
    assert same(tmp_path) == 1
    purged = read_token_table(open_dataset(tmp_path).storage, open_dataset(tmp_path).segments.shard(0))
    streams = [purged.values, *purged.columns.values()]
    assert not any(stream[:3].any() for stream in streams)  # The first document; 0 is the end of text, too.
    assert len(streams) == (3 if columns else 1)
    delete(tmp_path, ids=[id_of(2, 1)])
    compact(tmp_path)
    assert same(tmp_path) == 3
    expire(tmp_path, keep_last=1)
    assert same(tmp_path) == 2  # The one that was kept, and the one in which the others expired.


def test_columns_beside_the_tokens(tmp_path: Path) -> None:
    add(tmp_path, 1, columns=True)
    assert same(tmp_path) == 1
    (first, *_) = reader(tmp_path).documents(reader(tmp_path).commit(1))
    assert set(first) >= {"tokens", "loss_mask", "logits"}
    assert first["logits"] == [[1.0] * 3] * 3


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_records_whose_columns_have_changed(tmp_path: Path, format: Any) -> None:  # noqa: A002 - as everywhere
    schema = {"text": "string", "n": "int32", "labels": "list<string>"}
    with record_writer(tmp_path, schema=schema, format=format) as out:
        out.write({"text": f"ä{index}", "n": index, "labels": ["x"] * (index % 3)} for index in range(50))
    evolve(tmp_path, add={"score": "float64", "day": "date32[day]"}, defaults={"score": 0.5}, widen={"n": "int64"})
    with record_writer(tmp_path, format=format) as out:
        out.write({"text": "b", "n": 2**40, "labels": None, "score": 1.0, "day": None} for _ in range(3))
    evolve(tmp_path, rename={"text": "content"}, drop=["labels"])
    delete(tmp_path, where=pc.field("n") == 7)
    evolve(tmp_path, add={"labels": "string"}, defaults={"labels": "new"})
    assert same(tmp_path) == 6


def test_a_clone_that_refers_to_another_dataset(tmp_path: Path) -> None:
    add(tmp_path / "set", 1, columns=True)
    add(tmp_path / "set", 2, columns=True)
    delete(tmp_path / "set", ids=[id_of(1, 0)])
    clone(tmp_path / "set", tmp_path / "clone", shallow=True)
    add(tmp_path / "clone", 3, columns=True)
    assert not list((tmp_path / "clone").rglob(f"{1:032x}*"))
    assert same(tmp_path / "clone") == 2


def test_a_copy_of_the_newest_version_alone(tmp_path: Path) -> None:
    for name in range(3):
        add(tmp_path / "set", name)
    copy(tmp_path / "set", tmp_path / "copy")
    assert same(tmp_path / "copy") == 1


@pytest.mark.parametrize("lost", [None, "set", "other", "third"])
def test_a_dataset_on_several_disks_of_which_one_may_be_lost(tmp_path: Path, lost: str | None) -> None:
    roots = [str(tmp_path / name) for name in ("other", "third")]
    place_dataset(tmp_path / "set", roots=roots, copies=2)
    for name in range(4):
        add(tmp_path / "set", name)
    protect(tmp_path / "set", width=2)
    if lost is not None:
        shutil.rmtree(tmp_path / lost)
    assert same(tmp_path / ("other" if lost == "set" else "set")) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "_log" / f"{2:020}.json").unlink(),
        lambda root: shutil.copy(root / "_log" / f"{1:020}.json", root / "_log" / f"{2:020}.json"),
        lambda root: next((root / "_segments").iterdir()).write_bytes(b"short"),
        lambda root: next((root / "deletions").iterdir()).write_bytes(b"short"),
    ],
)
def test_what_the_page_forbids_is_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    add(tmp_path, 1)
    delete(tmp_path, ids=[id_of(1, 0)])
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        list(reader(tmp_path).documents(reader(tmp_path).commit(reader(tmp_path).newest())))


def test_a_feature_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    add(tmp_path, 1)
    path = tmp_path / "_log" / f"{1:020}.json"
    path.write_bytes(path.read_bytes().replace(b'"features": [', b'"features": ["magic", '))
    with pytest.raises(ValueError, match="magic"):
        reader(tmp_path).commit(1)


def test_a_version_names_what_its_reader_has_to_know(tmp_path: Path) -> None:
    def features(root: Path) -> set[str]:
        found = set(open_dataset(root).commit.features)
        assert "packed" in found  # Of every version that this package has written.
        return found - {"packed"}

    add(tmp_path / "set", 1)
    assert features(tmp_path / "set") == set()
    delete(tmp_path / "set", ids=[id_of(1, 0)])
    assert features(tmp_path / "set") == {"deletions"}
    compact(tmp_path / "set")
    assert features(tmp_path / "set") == set()
    clone(tmp_path / "set", tmp_path / "clone", shallow=True)
    assert features(tmp_path / "clone") == {"references"}
    add(tmp_path / "columns", 1, columns=True)
    assert features(tmp_path / "columns") == {"layout"}
    with record_writer(tmp_path / "records") as out:
        out.write({"text": "one"})
    evolve(tmp_path / "records", add={"n": "int8"})
    assert features(tmp_path / "records") == {"layout", "evolution"}
    place_dataset(tmp_path / "placed", roots=[str(tmp_path / "other")], copies=1)
    assert reader(tmp_path / "placed").info["features"] == ["placement"]


def test_types_that_a_reader_meets_are_those_of_the_page(tmp_path: Path) -> None:
    add(tmp_path, 1)
    (shard,) = reader(tmp_path).shards(reader(tmp_path).commit(1))
    table = pa.ipc.open_file((tmp_path / shard["path"]).read_bytes()).read_all()
    assert str(table.schema.field("tokens").type) == "list<item: uint16 not null>"

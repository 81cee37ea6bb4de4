"""What goes through a whole dataset, by this process and by engines: the same bytes, the same faults found."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
from typing_extensions import override

import datastore as ds
from datastore.dataset.operations.purge.purge import purge_selected


class Pool(ds.Engine):
    """Two processes of `concurrent.futures`, which answer in any order."""

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            yield from (each.result() for each in as_completed([pool.submit(work, order) for order in orders]))


class Twice(ds.Engine):
    """Does everything twice, and answers backwards."""

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        taken = list(orders)
        yield from map(work, [*reversed(taken), *taken])


class Lazy(ds.Engine):
    """Does all but the last order."""

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        yield from map(work, list(orders)[:-1])


ENGINES = [ds.LocalEngine(2), Pool(), Twice()]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred texts, every seventh twice with a word changed, as tokens in many shards and as records in some."""
    root = tmp_path_factory.mktemp("ground")
    words = Path(orjson.__file__).with_name("__init__.pyi").read_text().split() + dir(Path) + dir(str) + dir(pq)
    rows = []
    for number in range(400):
        text = [words[(number * 31 + at * 7) % len(words)] + str(number) for at in range(60)]
        rows.append({"id": f"{number}", "text": " ".join(text)})
        if number % 7 == 0:
            rows.append({"id": f"{number}-again", "text": " ".join([*text[:-1], "changed"])})
    (root / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (root / "tok.json").write_bytes(
        ds.train_tokenizer([str(root / "rows.jsonl")], settings=ds.TokenizerSettings(vocab_size=600))
    )
    settings = ds.IngestSettings(tokenizer=str(root / "tok.json"), task_bytes=20_000, shard_bytes=8_192, workers=1)
    ds.ingest(root / "rows.jsonl", root / "tokens", settings=settings)
    ds.delete(root / "tokens", where="id LIKE '%3'")
    ds.ingest(root / "rows.jsonl", root / "records", settings=ds.IngestSettings(shard_bytes=8_192, workers=1))
    ds.delete(root / "records", where="id LIKE '%3'")
    return root


def copied(ground: Path, kind: str, to: Path) -> Path:
    shutil.copytree(ground / kind, to)
    return to


def shards(url: Path) -> list[tuple[str, bytes]]:
    """Return the name and the bytes of each file of the newest version, in order."""
    dataset = ds.open(url)
    assert not ds.verify(dataset, deep=True).bad
    found = [dataset.segments.shard(index) for index in range(len(dataset.segments))]
    return [(path, (url / path).read_bytes()) for each in found for path in (each.path, each.docs_path) if path]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", ["tokens", "records"])
def test_an_engine_compacts_to_the_same_bytes(ground: Path, tmp_path: Path, kind: str, engine: ds.Engine) -> None:
    one, other = copied(ground, kind, tmp_path / "one"), copied(ground, kind, tmp_path / "other")
    told: list[tuple[int, int]] = []
    here = ds.compact(one, target_bytes=30_000)
    there = ds.compact(
        other, target_bytes=30_000, engine=engine, progress=lambda done, total: told.append((done, total))
    )
    assert there.committed
    assert (there.shards_before, there.shards_after) == (here.shards_before, here.shards_after)
    assert there.written_bytes == here.written_bytes > 0
    assert shards(one) == shards(other)
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize("engine", ENGINES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", ["tokens", "records"])
def test_an_engine_purges_to_the_same_bytes(ground: Path, tmp_path: Path, kind: str, engine: ds.Engine) -> None:
    one, other = copied(ground, kind, tmp_path / "one"), copied(ground, kind, tmp_path / "other")
    here, there = purge_selected(one), purge_selected(other, engine=engine)
    assert (there.documents, there.tokens, there.shards) == (here.documents, here.tokens, here.shards)
    assert there.documents > 20
    assert here.certificate is not None
    assert there.certificate is not None
    assert there.certificate.ids_sha256 == here.certificate.ids_sha256
    assert shards(one) == shards(other)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", ["tokens", "records"])
def test_an_engine_finds_the_same_duplicates(ground: Path, tmp_path: Path, kind: str, engine: ds.Engine) -> None:
    pytest.importorskip("rensa")
    tables = []
    for name, by in (("one", None), ("other", engine)):
        to = copied(ground, kind, tmp_path / name)
        settings = ds.DedupSettings(clusters=str(tmp_path / f"{name}.parquet"), keep="longest")
        report = ds.dedup(to, settings=settings, engine=by)
        assert report.committed
        assert report.duplicates > 40
        tables.append((pq.read_table(tmp_path / f"{name}.parquet"), ds.open(to).totals.documents, report.duplicates))
    assert tables[0] == tables[1]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("deep", [False, True])
def test_an_engine_finds_the_same_damage(ground: Path, tmp_path: Path, *, deep: bool, engine: ds.Engine) -> None:
    url = copied(ground, "tokens", tmp_path / "data")
    ds.protect(url)
    dataset = ds.open(url)
    assert ds.verify(dataset, deep=deep, engine=engine) == ds.verify(dataset, deep=deep)
    first, second, third = (url / dataset.segments.shard(index).path for index in (0, 3, 5))
    first.unlink()
    raw = bytearray(second.read_bytes())
    raw[len(raw) // 2] ^= 1
    second.write_bytes(raw)
    third.write_bytes(third.read_bytes()[:-9])
    here, there = ds.verify(dataset, deep=deep), ds.verify(dataset, deep=deep, engine=engine)
    assert sorted(map(repr, there.bad)) == sorted(map(repr, here.bad))
    assert {str(url / bad.path) for bad in there.bad} == {str(first), str(second), str(third)}
    assert (there.files, there.bytes, there.blocks) == (here.files, here.bytes, here.blocks)
    sample = ds.verify(dataset, sample=0.3, seed=5, engine=engine)
    assert sorted(map(repr, sample.bad)) == sorted(map(repr, ds.verify(dataset, sample=0.3, seed=5).bad))


def test_work_that_an_engine_leaves_out_is_found_out_and_changes_nothing(ground: Path, tmp_path: Path) -> None:
    url = copied(ground, "tokens", tmp_path / "data")
    before = ds.open(url).version
    with pytest.raises(
        ds.DatastoreError, match=r"the engine has not done all of the work \(engine='Lazy', left=1, shard="
    ):
        ds.compact(url, target_bytes=30_000, engine=Lazy())
    with pytest.raises(ds.DatastoreError, match="the engine has not done all of the work"):
        ds.verify(ds.open(url), engine=Lazy())
    assert ds.open(url).version == before


def test_an_error_of_another_process_comes_back_as_it_was(ground: Path, tmp_path: Path) -> None:
    url = copied(ground, "tokens", tmp_path / "data")
    gone = ds.open(url).segments.shard(2).path
    (url / gone).unlink()
    with pytest.raises(ds.MissingError, match=gone):
        ds.compact(url, target_bytes=30_000, engine=ds.LocalEngine(2))


def test_what_only_this_process_sees_is_not_for_engines() -> None:
    ds.ingest([{"text": "one"}], "memory://elsewhere/data")
    with pytest.raises(ds.ConfigError, match="other processes cannot see memory://"):
        ds.verify(ds.open("memory://elsewhere/data"), engine=ds.LocalEngine(2))


@pytest.mark.parametrize("workers", [-1, 2.5, "2"])
def test_a_number_of_processes_that_is_none_is_refused(workers: object) -> None:
    with pytest.raises(ds.ConfigError, match=r"workers is no whole number|not a number of processes"):
        ds.LocalEngine(workers)  # type: ignore[arg-type]

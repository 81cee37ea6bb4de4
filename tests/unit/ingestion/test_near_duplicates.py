"""Near duplicates: who is alike, which one stays, and that nothing is lost by it."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.quality.minhash import SIZE, WordHashes, agreement, clusters, rows_of_bands, signatures
from datastore.ingestion.quality.similar import DedupSettings, deduplicate
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer

pytest.importorskip("rensa")


def words(seed: int, count: int = 200) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(f"{seed}/{i}".encode())[:5] for i in range(count)]


def edited(seed: int, changes: int, by: str) -> str:
    text = words(seed)
    for i in range(changes):
        text[(i * 199) // max(1, changes)] = f"{by}{i}"
    return " ".join(text)


def runs(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4))}


def likeness(one: str, other: str) -> float:
    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


def signed(texts: list[str]) -> Any:
    return np.ascontiguousarray(signatures(texts, length=5, hashes=WordHashes()).T)


def test_signatures_estimate_how_much_two_texts_share() -> None:
    texts = [edited(1, changes, "x") for changes in (0, 1, 2, 4, 8, 16)]
    columns = signed(texts)
    for one, other in combinations(range(len(texts)), 2):
        found = agreement(columns, np.array([one]), np.array([other]))[0]
        assert found == pytest.approx(likeness(texts[one], texts[other]), abs=0.15)


def test_case_signs_and_spaces_make_no_difference() -> None:
    columns = signed(
        ["One, two; three-four five six!", "one two\nthree four FIVE six", "one two three four five seven"]
    )
    assert agreement(columns, np.array([0]), np.array([1]))[0] == 1
    assert agreement(columns, np.array([0]), np.array([2]))[0] < 1


def test_short_texts_are_alike_only_if_they_are_the_same() -> None:
    texts = ["a b", "A  b!", "a b c", "", "...", "", "—"]
    first = clusters(signed(texts), threshold=0.8)
    assert first.tolist() == [0, 0, 2, 3, 4, 3, 6]


def test_a_signature_is_the_same_in_whatever_company() -> None:
    texts = [edited(seed, seed, "y") for seed in range(50)]
    alone = np.concatenate([signatures([text], length=5, hashes=WordHashes()) for text in texts])
    assert (alone == signatures(texts, length=5, hashes=WordHashes())).all()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_look_at_nearly_every_pair_above_the_threshold(threshold: float) -> None:
    rows = rows_of_bands(threshold)
    missed = (1 - threshold**rows) ** (SIZE // rows)
    assert missed < 0.02


def test_clusters_are_those_of_all_pairs() -> None:
    texts = [edited(seed, changes, f"z{copy}") for seed in range(40) for copy, changes in enumerate((0, 1, 2, 12))]
    columns = signed(texts)
    expected = list(range(len(texts)))
    for one, other in combinations(range(len(texts)), 2):
        if agreement(columns, np.array([one]), np.array([other]))[0] >= 0.8:
            low, high = sorted((expected[one], expected[other]))
            expected = [low if each == high else each for each in expected]
    assert clusters(columns, threshold=0.8).tolist() == expected
    assert len(set(expected)) < len(texts)


def test_a_long_chain_is_one_cluster() -> None:
    text = words(3, 400)
    chain = []
    for i in range(60):
        text[i * 6 % 400] = f"c{i}"
        chain.append(" ".join(text))
    assert set(clusters(signed(chain), threshold=0.8).tolist()) == {0}


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


TEXTS = [
    edited(1, 0, ""),
    edited(2, 0, ""),
    edited(1, 2, "q") + " and more",
    edited(3, 0, ""),
    edited(2, 0, ""),
    edited(1, 60, "r"),
]


@pytest.fixture(params=["records", "tokens"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    source = write(tmp_path / "d.jsonl", TEXTS)
    settings = IngestSettings(workers=1, shard_bytes=1024)
    if request.param == "tokens":
        (tmp_path / "tok.json").write_bytes(train_tokenizer([source], settings=TokenizerSettings(vocab_size=400)))
        settings = IngestSettings(workers=1, shard_bytes=1024, tokenizer=str(tmp_path / "tok.json"))
    ingest([source], str(tmp_path / "data"), settings=settings)
    return str(tmp_path / "data")


def ids(url: str, version: int | None = None) -> list[str]:
    found = open_dataset(url, version=version)
    if found.kind == "records":
        return [row["id"] for row in found.iter_records()]
    return [name for i in range(len(found.segments)) for name in found.live_documents(i).column("id").to_pylist()]


def test_of_each_cluster_one_stays_and_the_version_before_has_all(dataset: str) -> None:
    report = deduplicate(dataset)
    assert (report.documents, report.clusters, report.duplicates, report.version) == (6, 2, 2, 2)
    assert ids(dataset) == ["d0", "d1", "d3", "d5"]
    assert ids(dataset, version=1) == [f"d{i}" for i in range(6)]
    again = deduplicate(dataset)
    assert (again.documents, again.duplicates, again.committed, again.version) == (4, 0, False, 2)


def test_the_longest_may_stay(dataset: str) -> None:
    deduplicate(dataset, settings=DedupSettings(keep="longest"))
    assert ids(dataset) == ["d1", "d2", "d3", "d5"]


def test_a_dry_run_deletes_nothing(dataset: str) -> None:
    report = deduplicate(dataset, dry_run=True)
    assert (report.duplicates, report.committed, report.version) == (2, False, 1)
    assert len(ids(dataset)) == 6


def test_clusters_are_written_by_their_ids(dataset: str, tmp_path: Path) -> None:
    deduplicate(dataset, settings=DedupSettings(clusters=str(tmp_path / "clusters.parquet")))
    assert pq.read_table(tmp_path / "clusters.parquet").to_pylist() == [
        {"id": "d0", "cluster": "d0", "kept": True},
        {"id": "d1", "cluster": "d1", "kept": True},
        {"id": "d2", "cluster": "d0", "kept": False},
        {"id": "d4", "cluster": "d1", "kept": False},
    ]


def test_a_looser_threshold_joins_more(dataset: str) -> None:
    strict, loose = (
        deduplicate(dataset, settings=DedupSettings(threshold=threshold), dry_run=True).duplicates
        for threshold in (1.0, 0.5)
    )
    assert (strict, loose) == (1, 2)


def test_records_without_a_text_are_named(tmp_path: Path) -> None:
    with record_writer(str(tmp_path / "data"), schema=pa.schema([("n", pa.int64())])) as out:
        out.write([{"n": 1}])
    with pytest.raises(ConfigError, match="no such column of text"):
        deduplicate(str(tmp_path / "data"))


def test_other_columns_may_hold_the_text(tmp_path: Path) -> None:
    with record_writer(str(tmp_path / "data"), schema=pa.schema([("body", pa.string())])) as out:
        out.write([{"body": edited(1, 0, "")}, {"body": None}, {"body": edited(1, 1, "k")}])
    report = deduplicate(str(tmp_path / "data"), settings=DedupSettings(text_column="body"))
    assert report.duplicates == 1

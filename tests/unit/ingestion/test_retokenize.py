"""A dataset encoded with another tokenizer: the same documents, whole or not at all."""

from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import datastore as ds

TEXTS = ["plain text", "naïve Ärger 🙂", "<|endoftext|> spelled out", "  spaces\n\n", "日本語"]


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    rows = [{"id": f"d{number}", "text": f"{TEXTS[number % 5]} {number}"} for number in range(200)]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    for name, vocab_size in (("one", 400), ("two", 300)):
        raw = ds.train_tokenizer([str(tmp_path / "rows.jsonl")], settings=ds.TokenizerSettings(vocab_size=vocab_size))
        (tmp_path / f"{name}.json").write_bytes(raw)
    ds.ingest(str(tmp_path / "rows.jsonl"), str(tmp_path / "one"), settings=with_tokenizer(tmp_path, "one"))
    return tmp_path


def with_tokenizer(root: Path, name: str) -> ds.IngestSettings:
    return ds.IngestSettings(tokenizer=str(root / f"{name}.json"), workers=1, shard_bytes=1024)


def anew(root: Path, *, source: str = "one", to: str = "two") -> object:
    return ds.retokenize(
        str(root / source),
        str(root / to),
        tokenizer=str(root / "two.json"),
        settings=ds.IngestSettings(workers=1, max_reject_ratio=1),
    )


def rows(root: Path, name: str) -> object:
    return ds.open(root / name).to_arrow(tokens=True).to_pylist()


def test_it_is_what_an_ingest_of_the_texts_would_have_been(ground: Path) -> None:
    anew(ground)
    ds.ingest(str(ground / "rows.jsonl"), str(ground / "direct"), settings=with_tokenizer(ground, "two"))
    assert rows(ground, "two") == rows(ground, "direct")
    assert len(rows(ground, "two")) == 200  # type: ignore[arg-type]
    assert ds.open(ground / "two").tokenizer() == (ground / "two.json").read_bytes()


def test_texts_that_were_never_tokens_are_taken_too(ground: Path) -> None:
    ds.ingest(str(ground / "rows.jsonl"), str(ground / "texts"))
    anew(ground, source="texts")
    found = ds.open(ground / "two").to_arrow()
    assert found.column("id").to_pylist() == [f"d{number}" for number in range(200)]
    assert found.column("source").unique().to_pylist() == ["rows.jsonl"]


def test_again_it_adds_nothing_and_later_what_is_new(ground: Path) -> None:
    anew(ground)
    assert anew(ground).added is False  # type: ignore[attr-defined]
    (ground / "more.jsonl").write_text('{"id": "new", "text": "more of it"}\n')
    ds.ingest(str(ground / "more.jsonl"), str(ground / "one"), settings=with_tokenizer(ground, "one"))
    assert anew(ground).documents == 1  # type: ignore[attr-defined]
    assert len(rows(ground, "two")) == 201  # type: ignore[arg-type]


def test_deleted_documents_stay_behind(ground: Path) -> None:
    ds.delete(str(ground / "one"), where=pc.field("id").isin(["d3", "d77"]))
    anew(ground)
    left = {row["id"] for row in rows(ground, "two")}  # type: ignore[attr-defined]
    assert left == {f"d{number}" for number in range(200)} - {"d3", "d77"}


def test_a_source_that_was_rewritten_in_between_is_not_taken_twice(ground: Path) -> None:
    anew(ground)
    ds.delete(str(ground / "one"), where=pc.field("id") == "d3")
    with pytest.raises(ds.ConfigError, match="has been compacted, or lost documents"):
        anew(ground)
    assert len(rows(ground, "two")) == 200  # type: ignore[arg-type]


def test_a_text_that_does_not_come_back_is_rejected(ground: Path) -> None:
    allowed = ds.IngestSettings(tokenizer=str(ground / "one.json"), special_tokens="allow", workers=1)
    (ground / "odd.jsonl").write_text('{"text": "one <|endoftext|> two"}\n{"text": "three"}\n')
    ds.ingest(str(ground / "odd.jsonl"), str(ground / "odd"), settings=allowed)
    report = anew(ground, source="odd")
    assert report.rejected == {"text_lost": 1}  # type: ignore[attr-defined]
    assert report.documents == 1  # type: ignore[attr-defined]


def test_what_has_columns_or_no_text_is_refused(ground: Path) -> None:
    with ds.token_writer(
        str(ground / "columns"), tokenizer=str(ground / "one.json"), columns={"weight": "float32"}
    ) as out:
        out.write([1, 2], id="a", source="b", weight=[0.5, 0.5])
    with pytest.raises(ds.ConfigError, match="columns that would have no place"):
        anew(ground, source="columns")
    with ds.record_writer(str(ground / "records"), schema=pa.schema([("n", pa.int64())])) as rows_out:
        rows_out.write([{"n": 1}])
    with pytest.raises(ds.ConfigError, match="holds records, not texts"):
        anew(ground, source="records")

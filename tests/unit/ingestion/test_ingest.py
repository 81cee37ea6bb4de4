"""An ingest as a user sees it: what gets in, what stays out, what is told, and what a second run does."""

import gzip
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard
from tokenizers import Tokenizer

from datastore.dataset.durability.verify import verify
from datastore.dataset.journal import Journal
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, FormatError, MissingError, RejectedError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.estimate import estimate
from datastore.ingestion.ingest import ingest
from datastore.ingestion.reading.documents import decode_rejects
from datastore.ingestion.report import IngestProgress, IngestReport
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.local import LocalStorage

SENTENCE = "the quick brown fox jumps over the lazy dog while naïve cats sit on a mat"
WORDS = SENTENCE.split()


def text(number: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(20 + number % 13)) + f" {number}\n"


@pytest.fixture
def tok(tmp_path: Path) -> str:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "w.txt").write_text("".join(map(text, range(50))))
    path = tmp_path / "tok.json"
    path.write_bytes(train_tokenizer([str(tmp_path / "words")], settings=TokenizerSettings(vocab_size=320)))
    return str(path)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    for number in range(12):
        path = folder / f"d{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(number))
    return folder


class Ingester:
    """Runs ingests into one dataset with settings that make many tasks and shards of little data."""

    def __init__(self, tmp_path: Path, tok: str) -> None:
        self.url = str(tmp_path / "data")
        self.base: dict[str, Any] = {"tokenizer": tok, "workers": 1, "task_bytes": 10_000, "shard_bytes": 1024}

    def __call__(self, *sources: Path | str, **settings: Any) -> IngestReport:
        return ingest([str(source) for source in sources], self.url, settings=IngestSettings(**self.base | settings))

    def open(self) -> Dataset:
        return open_dataset(self.url)

    def rejects(self, report: IngestReport) -> list[tuple[str, int, str]]:
        journal = Journal(LocalStorage(Path(self.url)), report.ingest_id)
        found = (reject for key, raw in journal.rejects() for reject in decode_rejects(raw, where=key))
        return [(reject.source, reject.offset, reject.reason) for reject in found]


@pytest.fixture
def run(tmp_path: Path, tok: str) -> Ingester:
    return Ingester(tmp_path, tok)


def documents(dataset: Dataset) -> list[dict[str, Any]]:
    """Every document of a token dataset with its text decoded from the shard."""
    raw = dataset.tokenizer()
    assert raw is not None
    tokenizer = Tokenizer.from_buffer(raw)
    found = []
    for index in range(len(dataset.segments)):
        values, offsets = dataset.token_shard(index)
        for row, (start, stop) in zip(dataset.documents(index).to_pylist(), pairwise(offsets), strict=True):
            ids = values[start:stop].tolist()
            assert ids[-1] == 0
            assert row["tokens"] == len(ids)
            found.append(row | {"text": tokenizer.decode(ids[:-1], skip_special_tokens=False)})
    return found


def lines(path: Path, *rows: object, pack: Callable[[bytes], bytes] = bytes) -> Path:
    path.write_bytes(pack(b"".join((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n" for row in rows)))
    return path


def test_every_file_becomes_a_document_that_says_where_it_is_from(run: Ingester, src: Path) -> None:
    report = run(src)
    found = documents(run.open())
    assert [row["source"] for row in found] == sorted(f"src/d{n % 3}/{n:02}.txt" for n in range(12))
    for row in found:
        data = (src.parent / row["source"]).read_bytes()
        assert (row["id"], row["offset"], row["length"]) == (row["source"], 0, len(data))
        assert row["text"].encode() == data
        assert row["digest"] == xxhash.xxh3_128_digest(data)
    assert (report.documents, report.files, report.added, report.version) == (12, 12, True, 1)
    assert report.tokens == run.open().totals.tokens
    assert report.text_bytes == sum(row["length"] for row in found)


def test_many_tasks_and_shards_keep_the_order_of_the_files(run: Ingester, src: Path) -> None:
    report = run(src)
    assert report.tasks > 2
    several = run(lines(src.parent / "more.jsonl", *({"text": text(i)} for i in range(200))), task_bytes=5_000)
    assert several.tasks > 1
    assert several.shards >= several.tasks
    assert [row["text"] for row in documents(run.open())[12:]] == [text(i) for i in range(200)]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_json_lines_point_back_to_the_line(
    run: Ingester, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    rows = [{"id": f"n{i}", "text": text(i)} for i in range(40)]
    path = lines(tmp_path / f"rows.jsonl{suffix}", *rows, pack=pack)
    run(path)
    plain = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    for row, found in zip(rows, documents(run.open()), strict=True):
        assert (found["id"], found["text"], found["source"]) == (row["id"], row["text"], path.name)
        assert json.loads(plain[found["offset"] : found["offset"] + found["length"]]) == row


def test_a_separator_cuts_a_text_file_into_documents(run: Ingester, tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(map(text, range(30))))
    run(path, separator="<|endoftext|>\n", task_bytes=1024)
    found = documents(run.open())
    assert [row["text"] for row in found] == [text(i) for i in range(30)]
    data = path.read_bytes()
    assert all(data[row["offset"] :].startswith(row["text"].encode()) for row in found)
    assert len({row["id"] for row in found}) == 30


def test_without_a_tokenizer_text_stays_text(run: Ingester, src: Path) -> None:
    report = run(src, tokenizer="")
    table = run.open().to_arrow()
    assert table.column_names == ["id", "source", "offset", "text"]
    assert table.column("text").to_pylist() == [
        (src.parent / name).read_text() for name in table.column("source").to_pylist()
    ]
    assert (report.kind, report.tokens, report.documents, report.encoder) == ("records", 0, 12, "")
    assert run(src, tokenizer="").added is False


BAD: list[tuple[object, str | None]] = [
    ({"text": text(1)}, None),
    (b'{"text": "caf\xe9"}', "invalid_utf8"),
    (b"{", "invalid_json"),
    ({"body": "x"}, "missing_text"),
    ({"text": None}, "null_text"),
    ({"text": ""}, "empty_text"),
    ({"text": 3}, "text_not_string"),
    ({"text": "x" * 5000}, "too_long"),
    ({"text": "a\0b"}, "nul"),
    (b'{"text": "\\ud800"}', "lone_surrogate"),
    ({"text": "first", "id": "same"}, None),
    ({"text": "second", "id": "same"}, "duplicate_id"),
    ({"text": text(2)}, None),
]


@pytest.mark.parametrize("tokenized", [True, False])
def test_bad_lines_are_kept_aside_with_place_and_reason_and_the_good_ones_get_in(
    run: Ingester, tmp_path: Path, *, tokenized: bool
) -> None:
    path = lines(tmp_path / "bad.jsonl", *(row for row, _ in BAD))
    settings = {"max_reject_ratio": 1.0, "max_document_bytes": 4000} | ({} if tokenized else {"tokenizer": ""})
    report = run(path, **settings)
    data = path.read_bytes()
    offsets = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    expected = [("bad.jsonl", offset, reason) for (_, reason), offset in zip(BAD, offsets, strict=False) if reason]
    assert sorted(run.rejects(report)) == sorted(expected)
    assert sum(report.rejected.values()) == len(expected)
    assert set(report.rejected) == {reason for _, _, reason in expected}
    dataset = run.open()
    texts = [row["text"] for row in documents(dataset)] if tokenized else dataset.to_arrow().column("text").to_pylist()
    assert texts == [text(1), "first", text(2)]
    assert report.documents == dataset.totals.documents == 3


@pytest.mark.parametrize("tokenized", [True, False])
def test_of_documents_with_one_id_the_first_stays_however_far_apart_they_are(
    run: Ingester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tokenized: bool
) -> None:
    monkeypatch.setattr("datastore.ingestion.tasks._BATCH_BYTES", 700)
    ids = [number % 150 if number % 3 else f"own {number}" for number in range(400)]
    path = lines(tmp_path / "rows.jsonl", *({"id": name, "text": text(i)} for i, name in enumerate(ids)))
    report = run(
        path, task_bytes=9_000, shard_bytes=1024, max_reject_ratio=1.0, **({} if tokenized else {"tokenizer": ""})
    )
    assert report.shards > report.tasks > 2
    first = [i for i, name in enumerate(ids) if ids.index(name) == i]
    dataset = run.open()
    rows = documents(dataset) if tokenized else dataset.to_arrow().to_pylist()
    assert [(row["id"], row["text"]) for row in rows] == [(str(ids[i]), text(i)) for i in first]
    assert report.rejected == {"duplicate_id": len(ids) - len(first)}
    assert len(run.rejects(report)) == len(ids) - len(first)
    assert report.documents == dataset.totals.documents == len(first)
    assert not verify(dataset).bad


def test_a_shard_of_nothing_but_repeated_ids_is_left_out(run: Ingester, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", *({"id": i % 50, "text": text(i)} for i in range(200)))
    report = run(path, task_bytes=2048, max_reject_ratio=1.0)
    assert report.shards < report.tasks
    assert [row["id"] for row in documents(run.open())] == [str(i) for i in range(50)]


def test_too_many_rejects_commit_nothing_and_a_higher_limit_goes_on_from_there(run: Ingester, tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", *({"text": text(i)} for i in range(9)), b"{")
    with pytest.raises(RejectedError, match=r"rejected=1, of=10.*invalid_json.*`max_reject_ratio=0\.1`"):
        run(path)
    with pytest.raises(MissingError, match="no version yet"):
        run.open()
    report = run(path, max_reject_ratio=0.1)
    assert (report.tasks_resumed, report.documents) == (1, 9)


@pytest.mark.parametrize("settings", [{}, {"max_reject_ratio": 1.0}, {"on_error": "skip"}, {"tokenizer": ""}])
def test_a_first_ingest_of_nothing_but_rejects_says_why_and_leaves_nothing(
    run: Ingester, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = lines(tmp_path / "bad.jsonl", {"content": "x"}, b"{", {"content": "y"})
    with pytest.raises(RejectedError, match="all documents were rejected") as found:
        run(path, **settings)
    assert found.value.values["rejected"] == 3
    assert found.value.values["reasons"] == {"invalid_json": 1, "missing_text": 2}
    assert "`text_key=KEY`" in found.value.hint
    assert (found.value.values.get("source") == "bad.jsonl") == ("on_error" not in settings)
    assert not Path(run.url).exists()
    assert run(path, text_key="content", max_reject_ratio=0.5).documents == 2


@pytest.mark.parametrize(
    ("content", "settings"), [(b"{oops", {"on_error": "fail"}), (b"\0", {}), (b'{"a": 1}\n[]', {"take": "rows"})]
)
def test_a_first_ingest_that_the_source_ends_leaves_nothing(
    run: Ingester, tmp_path: Path, content: bytes, settings: dict[str, Any]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / ("x" if b"\0" in content else "x.jsonl")).write_bytes(content)
    with pytest.raises((RejectedError, ConfigError)):
        run(tmp_path / "bad", **settings | ({"tokenizer": ""} if "take" in settings else {}))
    assert not Path(run.url).exists()


def test_what_another_ingest_has_begun_stays_when_the_first_one_had_only_rejects(
    run: Ingester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Journal.begin

    def both_begin(self: Journal, plan: Any, **options: Any) -> Any:
        Journal(self.storage, "0" * 32).storage.put(f"ingests/{'0' * 32}/running", b"")
        return begin(self, plan, **options)

    monkeypatch.setattr(Journal, "begin", both_begin)
    with pytest.raises(RejectedError):
        run(lines(tmp_path / "bad.jsonl", b"{"))
    assert (Path(run.url) / "datastore.json").exists()


def test_a_later_ingest_of_nothing_but_rejects_keeps_the_dataset_and_names_the_rejects(
    run: Ingester, tmp_path: Path, src: Path
) -> None:
    run(src)
    with pytest.raises(RejectedError, match=r"all documents were rejected.*all are described in .*rejects"):
        run(lines(tmp_path / "bad.jsonl", b"{"), max_reject_ratio=1.0)
    assert run.open().version == 1


def test_a_changed_file_is_reported_with_the_version_that_has_its_older_state(run: Ingester, src: Path) -> None:
    assert (run(src).changed_files, run(src).changed_since) == (0, 0)
    (src / "d1" / "new.txt").write_text("brand new")
    assert run(src).changed_files == 0
    (src / "d2" / "02.txt").write_text("changed")
    (src / "d1" / "new.txt").write_text("changed, too")
    assert estimate([str(src)], run.url, settings=IngestSettings(**run.base)).changed_files == 2
    report = run(src)
    assert (report.files, report.changed_files, report.changed_since) == (2, 2, 2)
    assert run.open().totals.documents == 15
    os.utime(src / "d0" / "00.txt", (1, 1))
    report = run(src)
    assert (report.changed_files, report.changed_since) == (1, 1)


def test_on_error_fail_stops_at_the_first(run: Ingester, tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", {"text": "good"}, b"{oops")
    with pytest.raises(RejectedError, match=r"invalid_json \(source='bad.jsonl', offset=16, begins='{oops'\)"):
        run(path, on_error="fail", max_reject_ratio=1.0)
    twice = lines(tmp_path / "twice.jsonl", {"text": "a", "id": 1}, {"text": "b", "id": 1})
    with pytest.raises(RejectedError, match="duplicate_id"):
        run(twice, on_error="fail", max_reject_ratio=1.0)


def test_on_error_skip_only_counts(run: Ingester, tmp_path: Path) -> None:
    report = run(lines(tmp_path / "bad.jsonl", {"text": "good"}, b"{"), on_error="skip", max_reject_ratio=1.0)
    assert report.rejected == {"invalid_json": 1}
    assert report.rejects == ""
    assert run.rejects(report) == []


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)])
def test_a_truncated_file_gives_what_it_still_has_and_one_reject(
    run: Ingester, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    rows = [{"text": "".join(map(chr, np.random.default_rng(i).integers(32, 127, 3000)))} for i in range(200)]
    path = lines(tmp_path / f"cut.jsonl{suffix}", *rows, pack=pack)
    path.write_bytes(path.read_bytes()[:-1000])
    report = run(path, max_reject_ratio=1.0)
    assert report.rejected == {"truncated": 1}
    found = [row["text"] for row in documents(run.open())]
    assert found == [row["text"] for row in rows[: len(found)]]
    assert len(found) > 100


def test_a_binary_file_of_a_folder_is_skipped_and_a_bad_byte_in_text_is_not(run: Ingester, src: Path) -> None:
    (src / "program").write_bytes(b"\x7fELF\0\0\0")
    (src / "latin1.txt").write_bytes(b"caf\xe9")
    report = run(src, max_reject_ratio=0.5)
    assert report.skipped == {"binary": 1}
    assert report.rejected == {"invalid_utf8": 1}
    assert run.rejects(report) == [("src/latin1.txt", 0, "invalid_utf8")]


def test_the_same_ingest_twice_adds_nothing(run: Ingester, src: Path) -> None:
    run(src)
    before = run.open().commit
    again = run(src)
    assert (again.added, again.version, again.known_files, again.documents) == (False, 1, 12, 0)
    assert run.open().commit == before


def test_a_grown_folder_adds_only_what_is_new(run: Ingester, src: Path) -> None:
    run(src)
    (src / "d1" / "new.txt").write_text("brand new")
    (src / "d2" / "02.txt").write_text("changed")
    os.utime(src / "d2" / "02.txt", (9, 9))
    report = run(src)
    assert (report.version, report.files, report.known_files, report.documents) == (2, 2, 11, 2)
    assert [row["text"] for row in documents(run.open())[12:]] == ["brand new", "changed"]
    assert run(src).added is False
    (src / "d1" / "new.txt").unlink()
    assert run(src).added is False


def test_other_settings_do_not_bring_known_files_again(run: Ingester, src: Path) -> None:
    run(src)
    assert run(src, task_bytes=2048, max_document_bytes=10).added is False


def test_the_dataset_lends_its_tokenizer_and_refuses_another(run: Ingester, src: Path, tmp_path: Path) -> None:
    run(src)
    (src / "new.txt").write_text("brand new")
    assert run(src, tokenizer="").kind == "tokens"
    other = tmp_path / "other.json"
    other.write_bytes(train_tokenizer([str(src)], settings=TokenizerSettings(vocab_size=300)))
    (src / "newer.txt").write_text("newer")
    with pytest.raises(ConfigError, match="the dataset has another tokenizer"):
        run(src, tokenizer=str(other))


def test_text_and_tokens_do_not_mix(run: Ingester, src: Path) -> None:
    run(src, tokenizer="")
    (src / "new.txt").write_text("brand new")
    with pytest.raises(ConfigError, match="the dataset holds text, not tokens"):
        run(src)


def test_bad_arguments_leave_no_trace(run: Ingester, src: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        run(src, tokenizer=str(tmp_path / "none.json"))
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        run(src, tokenizer=str(tmp_path / "wrong.json"))
    with pytest.raises(ConfigError, match="no such end-of-text"):
        run(src, end_of_text="</s>")
    with pytest.raises(MissingError):
        run(tmp_path / "nowhere")
    assert not Path(run.url).exists()


def test_a_place_that_holds_something_else_is_left_alone(run: Ingester, src: Path) -> None:
    Path(run.url).mkdir()
    (Path(run.url) / "thesis.doc").write_bytes(b"x")
    with pytest.raises((ConfigError, FormatError), match="not a dataset"):
        run(src)
    assert [path.name for path in Path(run.url).iterdir()] == ["thesis.doc"]


def test_a_version_cannot_be_added_to(run: Ingester, src: Path) -> None:
    run.url += "@3"
    with pytest.raises(ConfigError, match="a version cannot be added to"):
        run(src)


def test_a_target_inside_the_source_is_not_read(run: Ingester, src: Path) -> None:
    run.url = str(src / "data")
    run(src)
    again = run(src)
    assert (again.added, again.skipped) == (False, {"dataset": 1})


def test_sources_with_nothing_but_binaries_are_empty(run: Ingester, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "x").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="there is no document in it"):
        run(tmp_path / "bin")


@pytest.mark.parametrize(
    "content", ["other", text(0) + "longer", text(0).upper()], ids=["shorter", "longer", "as long"]
)
def test_a_file_that_changes_meanwhile_is_noticed(
    run: Ingester, src: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    keep_plan = Journal.keep_plan

    def then_write(self: Journal, plan: Any) -> Any:
        (src / "d0" / "00.txt").write_text(content)
        return keep_plan(self, plan)

    monkeypatch.setattr(Journal, "keep_plan", then_write)
    with pytest.raises(ConflictError, match=r"changed while it was ingested \(file='src/d0/00.txt'\)"):
        run(src)
    monkeypatch.undo()
    assert run(src).documents == 12


def test_a_file_that_goes_away_meanwhile_is_noticed(run: Ingester, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "keep_plan", lambda _, plan: (src / "d0" / "00.txt").unlink() or plan)
    with pytest.raises(ConflictError, match=r"changed while it was ingested \(file='src/d0/00.txt'\)"):
        run(src)


def test_progress_runs_from_nothing_to_everything(run: Ingester, src: Path) -> None:
    seen: list[IngestProgress] = []
    ingest([str(src)], run.url, settings=IngestSettings(**run.base), progress=seen.append)
    assert (seen[0].tasks_done, seen[0].source_bytes, seen[0].documents) == (0, 0, 0)
    last = seen[-1]
    assert (last.tasks_done, last.source_bytes) == (last.tasks, last.source_bytes_total)
    assert (last.documents, last.tokens) == (12, run.open().totals.tokens)
    for before, after in pairwise(astuple(now)[1:] for now in seen):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert list(dict.fromkeys(now.stage for now in seen)) == ["plan", "work", "commit"]


def test_the_report_says_what_the_processor_was_busy_with(run: Ingester, src: Path) -> None:
    started = time.process_time()
    report = ingest([str(src)], run.url, settings=IngestSettings(**run.base | {"workers": 1}))
    whole_s = time.process_time() - started
    assert report.cpu_s.keys() == (
        {"read", "encode", "write"} if report.kind == "tokens" else {"read", "write", "encode"}
    )
    assert all(seconds >= 0 for seconds in report.cpu_s.values())
    assert 0 < sum(report.cpu_s.values()) <= whole_s
    assert ingest([str(src)], run.url, settings=IngestSettings(**run.base)).cpu_s == {}


def test_an_interrupted_ingest_goes_on_where_it_was(run: Ingester, src: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop_after_two(progress: IngestProgress) -> None:
        if progress.tasks_done == 2:
            raise Stop

    settings = IngestSettings(**run.base)
    with pytest.raises(Stop):
        ingest([str(src)], run.url, settings=settings, progress=stop_after_two)
    seen: list[IngestProgress] = []
    report = ingest([str(src)], run.url, settings=settings, progress=seen.append)
    assert report.tasks_resumed == 2
    assert (seen[0].stage, seen[1].tasks_done) == ("plan", 2)
    assert (seen[-1].tasks_done, seen[-1].source_bytes) == (seen[-1].tasks, seen[-1].source_bytes_total)
    run.url = str(tmp_path / "undisturbed")
    run(src)
    undisturbed = open_dataset(run.url)
    assert [shard.digest for shard in undisturbed.segments] == [
        shard.digest for shard in open_dataset(report.url).segments
    ]


def test_a_dry_run_foretells_and_writes_nothing(run: Ingester, src: Path) -> None:
    expected = estimate([str(src)], run.url, settings=IngestSettings(**run.base))
    assert not Path(run.url).exists()
    report = run(src)
    assert (expected.files, expected.tasks, expected.kind) == (report.files, report.tasks, "tokens")
    assert expected.source_bytes == sum(path.stat().st_size for path in src.rglob("*.txt"))
    assert expected.tokens == pytest.approx(report.tokens, rel=0.2)
    assert expected.documents == pytest.approx(12, rel=0.2)
    again = estimate([str(src)], run.url, settings=IngestSettings(**run.base))
    assert (again.files, again.known_files, again.tokens) == (0, 12, 0)


def test_memory_is_for_this_process_alone(src: Path) -> None:
    report = ingest([str(src)], "memory://ingested", settings=IngestSettings(task_bytes=10_000))
    assert open_dataset("memory://ingested").totals.documents == report.documents == 12
    (src / "new.txt").write_text("new")
    with pytest.raises(ConfigError, match="other processes cannot see memory://"):
        ingest([str(src)], "memory://ingested", settings=IngestSettings(workers=2))


def _kinds_of_input(folder: Path, rng: random.Random) -> dict[str, str]:
    """Text of which the estimate has to know only a part: lines, compressed lines, a table, many files."""
    words = [f"w{rng.randrange(10**5)}" for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=int(rng.lognormvariate(6, 1)))) for _ in range(4000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    (folder / "plain.jsonl").write_bytes(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pq.write_table(pa.table({"text": texts}), folder / "table.parquet", row_group_size=100)
    (folder / "many").mkdir()
    for number, text in enumerate(texts[:1500]):
        (folder / "many" / f"{number}.txt").write_text(text)
    return {name: str(folder / name) for name in ("plain.jsonl", "packed.jsonl.gz", "table.parquet", "many")}


def test_an_estimate_is_within_a_fifth_of_what_then_happens(tmp_path: Path) -> None:
    sources = _kinds_of_input(tmp_path, random.Random(5))
    settings = IngestSettings(workers=1, task_bytes=2**20)
    for name, source in sources.items():
        expected = estimate([source], str(tmp_path / f"of {name}"), settings=settings)
        report = ingest(source, str(tmp_path / f"of {name}"), settings=settings)
        assert expected.documents == pytest.approx(report.documents, rel=0.2), name
        assert expected.shard_bytes == pytest.approx(report.text_bytes, rel=0.2), name


def test_progress_counts_the_stored_bytes_of_a_compressed_file(tmp_path: Path) -> None:
    source = _kinds_of_input(tmp_path, random.Random(5))["packed.jsonl.gz"]
    steps: list[IngestProgress] = []
    ingest(source, str(tmp_path / "data"), settings=IngestSettings(workers=1), progress=steps.append)
    size = Path(source).stat().st_size
    assert steps[-1].source_bytes == steps[-1].source_bytes_total == size
    shares = [(step.documents / 4000, step.source_bytes / size) for step in steps if 0 < step.documents < 4000]
    assert shares
    assert all(done >= documents - 0.2 for documents, done in shares)


def test_a_report_counts_texts_by_their_length(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "é" * n}) + "\n" for n in (1, 1, 3, 4, 100)))
    report = ingest(str(tmp_path / "rows.jsonl"), str(tmp_path / "data"), settings=IngestSettings(workers=1))
    assert report.lengths == (0, 0, 2, 1, 1, 0, 0, 0, 1)

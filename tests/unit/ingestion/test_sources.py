"""Which files a source has, what they are called, and what is left out."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.errors import ConfigError, MissingError
from datastore.ingestion.reading.listing import kind_of
from datastore.ingestion.reading.sources import list_sources, read_url
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.memory import MemoryStorage

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(name: str, content: bytes = b"text\n") -> Path:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    write("a.txt")
    return write


def listed(*sources: Path | str, **settings: object) -> tuple[list[str], dict[str, int]]:
    listing, _ = list_sources([str(source) for source in sources], IngestSettings(**settings))  # type: ignore[arg-type]
    return [file.path for file in listing.files], dict(listing.skipped)


def test_files_are_called_after_the_source_and_their_place_in_it_and_sorted(put: Put, tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "b.txt", "B/x"):
        put(name)
    assert listed(tmp_path / "src")[0] == ["src/B/x", "src/a.txt", "src/b.txt", "src/b/a.py", "src/b/z.py"]


def test_the_same_folder_has_the_same_name_however_it_is_written(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    expected = listed(tmp_path / "src")
    assert listed(f"{tmp_path}/src/") == expected
    assert listed(f"file://{tmp_path}/src") == expected
    assert listed(tmp_path / "link") == expected
    monkeypatch.chdir(tmp_path / "src")
    assert listed(".") == expected
    assert listed("../src") == expected


def test_a_moved_folder_keeps_its_fingerprints_and_a_touched_file_does_not(put: Put, tmp_path: Path) -> None:
    def prints(folder: Path) -> list[str]:
        return [file.fingerprint for file in list_sources([str(folder)], IngestSettings())[0].files]

    path = put("b.txt")
    before = prints(tmp_path / "src")
    (tmp_path / "else").mkdir()
    moved = (tmp_path / "src").rename(tmp_path / "else" / "src")
    assert prints(moved) == before
    os.utime(moved / path.name, (1, 1))
    assert prints(moved) == [before[0], prints(moved)[1]]
    assert prints(moved)[1] != before[1]


def test_a_line_read_by_another_key_is_another_document(put: Put) -> None:
    path = str(put("b.jsonl", b"{}\n"))
    first, second = (
        list_sources([path], IngestSettings(text_key=key))[0].files[0].fingerprint for key in ("text", "body")
    )
    assert first != second


def test_what_is_left_out_is_counted_by_reason(put: Put, tmp_path: Path) -> None:
    put(".git/config")
    put(".env")
    put("empty.txt", b"")
    put("picture.PNG")
    put("archive.tar.gz")
    put("back\\slash")
    put("tests/skip.py")
    put("old/datastore.json")
    put("old/more.txt")
    (tmp_path / "src" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    os.mkfifo(tmp_path / "src" / "pipe")
    assert listed(tmp_path / "src", exclude=("tests",)) == (
        ["src/a.txt"],
        {"binary": 2, "dataset": 1, "empty": 1, "excluded": 1, "hidden": 2, "odd_name": 2, "special_file": 1},
    )


def test_no_link_is_followed_and_one_that_leaves_the_root_is_refused(put: Put, tmp_path: Path) -> None:
    put("b.txt")
    outside = tmp_path / "secret.txt"
    outside.write_bytes(b"secret")
    source = tmp_path / "src"
    (source / "in").symlink_to("a.txt")
    (source / "out").symlink_to(outside)
    (source / "up").symlink_to("..")
    (source / "loop").symlink_to("loop")
    (source / "self").symlink_to(".")
    found, skipped = listed(source)
    assert found == ["src/a.txt", "src/b.txt"]
    assert skipped == {"outside_root": 2, "symlink": 3}


def test_globs_without_a_slash_match_names_and_with_one_paths(put: Put, tmp_path: Path) -> None:
    for name in ("x.py", "lib/y.py", "lib/y.txt", "lib/deep/z.py", "site-packages/big.py"):
        put(name)
    source = tmp_path / "src"
    assert listed(source, include=("*.py",), exclude=("site-packages",))[0] == [
        "src/lib/deep/z.py",
        "src/lib/y.py",
        "src/x.py",
    ]
    assert listed(source, include=("lib/*",))[0] == ["src/lib/deep/z.py", "src/lib/y.py", "src/lib/y.txt"]
    assert listed(source, include=("lib",), exclude=("lib/deep",))[0] == ["src/lib/y.py", "src/lib/y.txt"]


def test_one_file_is_a_source_too_and_nothing_about_it_is_skipped(put: Put) -> None:
    listing, roots = list_sources([str(put(".hidden.txt"))], IngestSettings())
    assert [(file.path, file.lone) for file in listing.files] == [(".hidden.txt", True)]
    folder, key = roots.locate(".hidden.txt")
    assert Path(folder, key).read_bytes() == b"text\n"


def test_a_file_named_through_a_link_keeps_the_name_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b2c").write_bytes(b"{}\n")
    (tmp_path / "rows.jsonl").symlink_to("blobs/0a1b2c")
    listing, roots = list_sources([str(tmp_path / "rows.jsonl")], IngestSettings())
    assert [(file.path, file.format, file.size_bytes) for file in listing.files] == [("rows.jsonl", "jsonl", 3)]
    assert Path(*roots.locate("rows.jsonl")).read_bytes() == b"{}\n"


def test_a_remote_folder_is_listed_by_the_same_rules() -> None:
    storage = MemoryStorage("remote")
    for key in ("a.txt", ".git/x", "t/b.py", "t/c.png", "skip/d.py"):
        storage.put(key, b"text")
    storage.put("e.txt", b"")
    for key in ("deep/data/_log/1.json", "deep/data/datastore.json"):
        storage.put(key, b"{}")
    found, skipped = listed("memory://remote", exclude=("skip",))
    assert found == ["remote/a.txt", "remote/t/b.py"]
    assert skipped == {"binary": 1, "dataset": 1, "empty": 1, "excluded": 1, "hidden": 1}


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("nowhere", MissingError, "the source does not exist"),
        ("memory://nothing-here", MissingError, "does not exist or is empty"),
        ("empty", ConfigError, "the source is empty"),
        ("hidden", ConfigError, r"the source is empty.*'hidden': 1"),
        ("none.txt", ConfigError, "the source is empty"),
        ("model.safetensors", ConfigError, "this kind of file cannot be read"),
        ("gopher://x", ConfigError, "gopher"),
        ("", ConfigError, "empty"),
    ],
)
def test_a_source_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".x").write_bytes(b"x")
    (tmp_path / "none.txt").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        listed(source)


def test_without_a_source_there_is_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match="there is no source"):
        listed()


def test_two_sources_of_one_name_would_be_confused(put: Put, tmp_path: Path) -> None:
    put("b.txt")
    (tmp_path / "other" / "src").mkdir(parents=True)
    (tmp_path / "other" / "src" / "b.txt").write_bytes(b"b")
    with pytest.raises(ConfigError, match="two sources have the same name"):
        listed(tmp_path / "src", tmp_path / "other" / "src")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("A.JSONL.GZ", ("jsonl", "gz")),
        ("a.ndjson.zst", ("jsonl", "zst")),
        ("a.txt.gz", ("text", "gz")),
        ("a.json", ("text", "")),
        ("README", ("text", "")),
        ("a.tar.gz", None),
        ("a.gz", None),
        ("a.so", None),
        ("a.parquet", None),
    ],
)
def test_the_name_says_how_to_read_a_file(name: str, kind: tuple[str, str] | None) -> None:
    assert kind_of(name) == kind


def test_a_file_is_read_by_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tok.json").write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    assert (
        read_url("tok.json") == read_url(str(tmp_path / "tok.json")) == read_url(f"file://{tmp_path}/tok.json") == b"{}"
    )
    with pytest.raises(MissingError, match="no such file"):
        read_url("tok2.json")

"""Lists of files, zip archives, what git ignores, and texts of several fields."""

import io
import json
import random
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import datastore as ds
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.settings import IngestSettings

LINES = "".join(json.dumps({"id": f"d{i}", "text": f"line {i} " * 50}) + "\n" for i in range(500)).encode()


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out)
    return out.getvalue()


def archive(path: Path, members: dict[str, bytes], *, stored: bool = False) -> Path:
    kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", kind) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def texts(to: Path) -> list[str]:
    return sorted(row["text"] for row in ds.open(str(to)).iter_records())


MEMBERS = {"a.jsonl": LINES, "docs/one.txt": b"One text.", "t.parquet": parquet(["x", "y"]), ".hidden": b"no"}
EXPECTED = sorted([json.loads(line)["text"] for line in LINES.splitlines()] + ["One text.", "x", "y"])


@pytest.mark.parametrize("pack", ["stored", "deflated"])
@pytest.mark.parametrize("where", ["in a folder", "alone"])
def test_the_members_of_an_archive_are_files(where: str, pack: str, tmp_path: Path) -> None:
    inside, stored = where == "in a folder", pack == "stored"
    (tmp_path / "src" / "deep").mkdir(parents=True)
    path = archive(tmp_path / "src" / "deep" / "all.zip", MEMBERS, stored=stored)
    settings = IngestSettings(task_bytes=2**12, workers=1)
    report = ds.ingest(str(tmp_path / "src" if inside else path), str(tmp_path / "data"), settings=settings)
    assert texts(tmp_path / "data") == EXPECTED
    assert report.skipped == {"hidden": 1}
    sources = {row["source"] for row in ds.open(str(tmp_path / "data")).iter_records()}
    assert ("src/deep/all.zip/docs/one.txt" if inside else "all.zip/docs/one.txt") in sources
    again = ds.ingest(str(tmp_path / "src" if inside else path), str(tmp_path / "data"), settings=settings)
    assert not again.added


def test_a_member_that_has_changed_is_another_file_even_of_one_size_and_time(tmp_path: Path) -> None:
    for number, data in enumerate((b"first", b"other")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
            out.writestr(zipfile.ZipInfo("same.txt"), b"same")
            out.writestr(zipfile.ZipInfo("a.txt"), data)
        report = ds.ingest(str(tmp_path / "a.zip"), str(tmp_path / "data"))
        assert (report.files, report.changed_files) == (2 - number, number)
    assert texts(tmp_path / "data") == ["first", "other", "same"]


def test_an_archive_of_the_large_kind_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out, out.open("a.txt", "w", force_zip64=True) as member:
        member.write(b"Some text.")
    assert ds.ingest(str(tmp_path / "a.zip"), str(tmp_path / "data")).documents == 1


def test_members_that_cannot_be_read_are_counted_and_never_lead_out(tmp_path: Path) -> None:
    inner = archive(tmp_path / "inner.zip", {"x.txt": b"x"}).read_bytes()
    path = archive(
        tmp_path / "a.zip", {"good.txt": b"good", "inner.zip": inner, "../up.txt": b"up", "/top.txt": b"top"}
    )
    raw = bytearray(
        archive(tmp_path / "b.zip", {"secret.txt": b"secret", "good.txt": b"good too"}, stored=True).read_bytes()
    )
    raw[raw.index(b"PK\3\4") + 6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(raw)
    report = ds.ingest([str(path), str(tmp_path / "b.zip")], str(tmp_path / "data"))
    assert texts(tmp_path / "data") == ["good", "good too"]
    assert report.skipped == {"encrypted": 1, "nested_archive": 1, "odd_name": 2}


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    random.seed(0)
    noise = "".join(random.choices("abcdefgh \n", k=20_000)).encode()
    raw = bytearray(archive(tmp_path / "a.zip", {"a.txt": noise}).read_bytes())
    raw[3000] ^= 255
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(CorruptError, match=r"a\.zip/a\.txt"):
        ds.ingest(str(tmp_path / "a.zip"), str(tmp_path / "data"))
    (tmp_path / "a.zip").write_bytes(raw[:2000])
    with pytest.raises(FormatError, match="not a zip archive"):
        ds.ingest(str(tmp_path / "a.zip"), str(tmp_path / "data"))


def test_a_list_names_files_after_the_folder_that_they_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("src/a/x.txt", "src/b/x.txt", "src/b/left.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "files.txt").write_text(f"src/a/x.txt\n\n{tmp_path}/src/b/x.txt\r\nsrc/a/x.txt\n")
    monkeypatch.chdir(tmp_path)
    assert ds.ingest("@files.txt", "data").documents == 2
    assert {row["source"] for row in ds.open("data").iter_records()} == {"src/a/x.txt", "src/b/x.txt"}
    assert call(cli, ["ingest", "--files-from", "files.txt", "--to", "other"], CliSession()) == 0
    assert texts(tmp_path / "other") == texts(tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ConfigError),
        (b"\n \n", ConfigError),
        (b"\xff\xfe", ConfigError),
        (b"missing.txt\n", MissingError),
        (b"a.txt\ns3://bucket/b.txt\n", ConfigError),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(
    content: bytes, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("files.txt").write_bytes(content)
    with pytest.raises(error):
        ds.ingest("@files.txt", "data")


IGNORED = {
    ".gitignore": "*.log\n!keep.log\nbuild/\n/top.txt\n# a comment\ndocs/*.tmp\n**/cache/**\n\\#odd\n",
    "sub/.gitignore": "!other.log\nlocal.*\n",
    "sub/deep/.gitignore": "*\n!only.py\n",
}
FILES = """
    a.log keep.log sub/b.log sub/other.log sub/keep.log build/x.py sub/build/y.py top.txt sub/top.txt docs/a.tmp docs/in/a.tmp
    sub/local.py local.py x/cache/a/b.txt sub/deep/only.py sub/deep/not.py sub/deep/er/z.py #odd plain.py build.py
"""


@pytest.mark.parametrize("start", ["", "sub", "sub/deep"])
def test_what_git_ignores_is_left_out_on_request(start: str, tmp_path: Path) -> None:
    for name, content in {**IGNORED, **dict.fromkeys(FILES.split(), "text")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    seen = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=tmp_path / start,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    listing, _ = list_sources([str(tmp_path / start)], IngestSettings(gitignore=True))
    found = sorted(file.path.split("/", 1)[1] for file in listing.files)
    assert found == sorted(name for name in seen if not name.rpartition("/")[2].startswith("."))
    assert listing.skipped["ignored"] > 0
    assert len(list_sources([str(tmp_path / start)], IngestSettings())[0].files) > len(found)


ROWS = [{"title": f"T{i}", "body": f"Body {i}", "n": i} for i in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_template_makes_one_text_of_several_fields(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    settings = IngestSettings(template=r"{title}\n\n{body} {{}}")
    ds.ingest(str(path), str(tmp_path / "data"), settings=settings)
    assert texts(tmp_path / "data") == [f"T{i}\n\nBody {i} {{}}" for i in range(5)]


def test_a_record_that_lacks_a_field_is_rejected_for_it(tmp_path: Path) -> None:
    rows: list[Any] = [*ROWS, {"title": "x"}, {"title": "x", "body": None}, {"title": 1, "body": "y"}, [1]]
    rows.append({"title": "", "body": "no title"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = IngestSettings(template="{title}|{body}", max_reject_ratio=0.9)
    report = ds.ingest(str(tmp_path / "a.jsonl"), str(tmp_path / "data"), settings=settings)
    assert report.rejected == {"missing_text": 1, "null_text": 1, "text_not_string": 1, "invalid_json": 1}
    assert "|no title" in texts(tmp_path / "data")


@pytest.mark.parametrize("template", ["no field", "{", "{}", "{a!r}", "{a:>5}"])
def test_a_wrong_template_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ConfigError, match="template"):
        ds.ingest(str(tmp_path / "a.jsonl"), str(tmp_path / "data"), settings=IngestSettings(template=template))

"""Bad input through the command line: one clear line, the right status, and nothing lost or half written."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.digest import digest_hex

RUN = """
[data]
url = "data"
seq_len = 32
global_batch = 4

[model]
layers = 1
width = 16
heads = 2

[train]
steps = 2
precision = "fp32"
threads = 1

[eval]
every = 0
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources, a tokenizer, a dataset, a config and a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "src").mkdir()
    for number in range(20):
        (folder / "src" / f"{number}.txt").write_text(f"The {number}th text says hello.\n" * 30, encoding="utf-8")
    (folder / "run.toml").write_text(RUN, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in (
            "tokenizer train src --vocab 300 --to tok.json",
            "ingest src --to data --tokenizer tok.json --workers 1",
            "train run.toml --to run",
        ):
            assert call(cli, line.split(), CliSession()) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`, which is the current folder."""
    folder = tmp_path / "w"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def told(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command line, expects a status, and returns the one line on stderr."""

    def run(*words: str, status: int, keeps: str = ".") -> str:
        before = tree(here / keeps)
        capfd.readouterr()
        assert call(cli, list(words), CliSession()) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert re.fullmatch(r"error\[([a-z]+)\]: .*[.?`]( See: datastore explain \1)?\n", err), err
        assert "Traceback" not in err
        assert tree(here / keeps) == before
        return err

    return run


def test_a_source_that_does_not_exist(told: Callable[..., str]) -> None:
    assert "nowhere" in told("ingest", "nowhere", "--to", "new", status=1)


def test_an_empty_source(told: Callable[..., str], here: Path) -> None:
    (here / "empty").mkdir()
    assert "empty" in told("ingest", "empty", "--to", "new", status=2)


@pytest.mark.parametrize("command", [["show"], ["ingest", "src", "--to"], ["doctor", "--url"], ["checkpoint", "ls"]])
def test_a_url_with_an_unknown_scheme(told: Callable[..., str], command: list[str]) -> None:
    assert "gopher" in told(*command, "gopher://host/data", status=2)


def test_a_url_that_holds_something_else(told: Callable[..., str]) -> None:
    assert "not a dataset" in told("show", "src", status=1)
    assert "not a dataset" in told("ingest", "src", "--to", "src", status=1)
    assert "run" in told("resume", "data", status=1)
    assert "src" in told("train", "run.toml", "--to", "src", status=2)


def test_a_dataset_or_version_that_is_not_there(told: Callable[..., str]) -> None:
    assert "nowhere" in told("show", "nowhere", status=1)
    assert "version=7" in told("show", "data@7", status=1)
    assert "'v9'" in told("show", "data@v9", status=1)


def test_a_newer_format(told: Callable[..., str], here: Path) -> None:
    path = here / "data" / "datastore.json"
    newer = path.read_bytes().replace(b'"format": 1', b'"format": 2')
    blank = re.sub(rb'"digest": "[0-9a-f]+"', b'"digest": ""', newer)
    path.write_bytes(blank.replace(b'"digest": ""', f'"digest": "{digest_hex(blank)}"'.encode()))
    assert told("show", "data", status=1).startswith("error[format]: ")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stepz=3", "stepz"),
        ("train.steps=many", "`train.steps"),
        ("train.steps=0", "`train.steps"),
        ("data.holdout=0.9", "`data.holdout"),
        ("optim.lr=-1", "`optim.lr"),
        ("steps=3", "steps"),
        ("train", "train"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(told: Callable[..., str], override: str, named: str) -> None:
    line = told("train", "run.toml", "--to", "new", "--set", override, status=2)
    assert named in line
    assert line.startswith("error[config]: ")


def test_a_config_that_is_no_toml_or_not_there(told: Callable[..., str], here: Path) -> None:
    (here / "bad.toml").write_text("[data\n", encoding="utf-8")
    assert "bad.toml" in told("train", "bad.toml", "--to", "new", status=2)
    assert "none.toml" in told("train", "none.toml", "--to", "new", status=1)


def test_a_sample_longer_than_the_whole_dataset(told: Callable[..., str]) -> None:
    line = told("train", "run.toml", "--to", "new", "--set", "data.seq_len=1000000", status=2, keeps="data")
    assert "seq_len" in line


def test_a_tokenizer_that_does_not_match_the_dataset(told: Callable[..., str]) -> None:
    assert call(cli, ["tokenizer", "train", "src", "--vocab", "280", "--to", "other.json"], CliSession()) == 0
    assert "tokenizer" in told("ingest", "run.toml", "--to", "data", "--tokenizer", "other.json", status=2)


def test_a_file_that_is_no_tokenizer(told: Callable[..., str]) -> None:
    assert "tokenizer" in told("ingest", "src", "--to", "new", "--tokenizer", "run.toml", status=2)


def damage(path: Path, *, truncate: bool) -> None:
    raw = bytearray(path.read_bytes())
    if truncate:
        del raw[len(raw) // 2 :]
    else:
        raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("truncate", [True, False], ids=["truncated", "flipped"])
@pytest.mark.parametrize("pattern", ["_log/0*.json", "_segments/*.arrow", "datastore.json"])
def test_a_damaged_manifest(told: Callable[..., str], here: Path, pattern: str, *, truncate: bool) -> None:
    damage(next((here / "data").glob(pattern)), truncate=truncate)
    line = told("train", "run.toml", "--to", "new", status=1, keeps="data")
    assert line.startswith(("error[corrupt]: ", "error[format]: "))


@pytest.mark.parametrize("truncate", [True, False], ids=["truncated", "flipped"])
def test_a_damaged_shard(told: Callable[..., str], here: Path, *, truncate: bool) -> None:
    damage(next((here / "data" / "shards").rglob("*.arrow")), truncate=truncate)
    line = told("train", "run.toml", "--to", "new", status=1, keeps="data")
    assert line.startswith("error[corrupt]: ")
    assert "shards/" in line


def test_verify_names_a_damaged_shard(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((here / "data" / "shards").rglob("*.arrow"))
    damage(path, truncate=False)
    assert call(cli, ["verify", "data"], CliSession()) == 1
    assert str(path.relative_to(here / "data")) in capsys.readouterr().out


@pytest.mark.parametrize("truncate", [True, False], ids=["truncated", "flipped"])
def test_a_damaged_checkpoint(told: Callable[..., str], here: Path, *, truncate: bool) -> None:
    for path in (here / "run" / "parts").glob("*.safetensors"):
        damage(path, truncate=truncate)
    assert told("resume", "run", "--set", "train.steps=3", status=1, keeps="run/parts").startswith("error[corrupt]: ")


def test_a_run_that_belongs_to_another_config(told: Callable[..., str]) -> None:
    line = told("train", "run.toml", "--to", "run", "--set", "optim.weight_decay=0.5", status=1, keeps="run")
    assert line.startswith("error[resume]: ")
    assert "optim.weight_decay" in line


def test_a_run_that_belongs_to_another_dataset(told: Callable[..., str], here: Path) -> None:
    shutil.rmtree(here / "data")
    assert call(cli, ["ingest", "src", "--to", "data", "--tokenizer", "tok.json", "--workers", "1"], CliSession()) == 0
    assert "uuid" in told("resume", "run", "--set", "train.steps=3", status=1, keeps="run/parts")


@pytest.mark.parametrize("processes", ["0", "-1"])
def test_a_world_of_no_ranks(told: Callable[..., str], processes: str) -> None:
    assert "rank" in told("train", "run.toml", "--to", "new", "--processes", processes, status=2)


def test_a_world_of_no_ranks_from_a_launcher(told: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "0")
    monkeypatch.setenv("RANK", "0")
    assert "WORLD_SIZE" in told("train", "run.toml", "--to", "new", status=2)


def test_more_bad_records_than_the_limit_allows(told: Callable[..., str], here: Path) -> None:
    (here / "lines.jsonl").write_text('{"text": "fine"}\nnot json\n', encoding="utf-8")
    line = told("ingest", "lines.jsonl", "--to", "new", status=3, keeps="data")
    assert line.startswith("error[rejected]: ")
    assert call(cli, ["show", "new"], CliSession()) == 1


def datastore(*words: str, **options: object) -> "subprocess.Popen[str]":
    """Start a process of its own, as a user does."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("datastore"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.usefixtures("here")
def test_a_file_that_may_not_grow_further() -> None:
    def limit() -> None:
        # The kernel refuses the write as it would on a full disk, with another number.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    with datastore("ingest", "src", "--to", "new", "--tokenizer", "tok.json", preexec_fn=limit) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("error[storage]: ")
    assert err.count("\n") == 1
    assert call(cli, ["ingest", "src", "--to", "new", "--tokenizer", "tok.json", "--workers", "1"], CliSession()) == 0


def test_a_target_that_cannot_be_written(told: Callable[..., str]) -> None:
    assert told("ingest", "src", "--to", "/proc/new", status=1).startswith("error[storage]: ")
    assert told("train", "run.toml", "--to", "/proc/new", status=1).startswith("error[storage]: ")
    assert told("tokenizer", "train", "src", "--vocab", "300", "--to", "/proc/new.json", status=1)


@pytest.mark.slow
def test_a_second_writer_on_the_same_run(here: Path) -> None:
    words = ("train", "run.toml", "--to", "long", "--set", "train.steps=100000")
    with datastore(*words) as first:
        wait_for(here / "long" / "metrics", first)
        with datastore(*words) as second:
            _, err = second.communicate(timeout=120)
        assert second.returncode == 1
        assert err.startswith("error[conflict]: ")
        assert str(first.pid) in err
        assert err.count("\n") == 1
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=120)
    assert first.returncode == 0
    assert "datastore resume" in out


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.6, 1.0, 1.5, 2.5])
@pytest.mark.usefixtures("here")
def test_an_interrupt_at_any_time_is_one_line_and_the_command_goes_on(seconds: float) -> None:
    words = ("ingest", "src", "--to", "new", "--tokenizer", "tok.json", "--workers", "2")
    with datastore(*words) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    # Until `__main__` has been read, an interrupt is for the interpreter to answer.
    assert process.returncode in {0, 130, -signal.SIGINT} or err.startswith("Fatal Python error: init_import_site")
    assert set(re.findall(r"datastore/[\w/]+\.py", err)) <= {"datastore/__init__.py"}
    assert call(cli, list(words), CliSession()) == 0
    assert call(cli, ["verify", "new"], CliSession()) == 0


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)

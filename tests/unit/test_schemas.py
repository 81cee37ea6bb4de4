"""schemas/ says what the code says: JSON Schema and decoder judge every case alike, and old stores stay readable."""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit
from datastore.dataset.log.tags import list_tags
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.document import decode
from datastore.errors import CorruptError
from datastore.ingestion.writers.records import record_writer
from datastore.testing.examples import make_dataset

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "schemas"
CASES = sorted((SCHEMAS / "cases").rglob("*.json"))
GOLDEN = sorted((SCHEMAS / "golden").glob("v*"))


@cache
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schemas_tool", ROOT / "tools" / "schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schemas_are_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool().main(["--check"]) == 0, capsys.readouterr().out


def test_the_check_notices_a_schema_that_is_stale_missing_or_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(SCHEMAS, tmp_path / "schemas"))
    monkeypatch.setattr(tool(), "ROOT", folder)
    (folder / "dataset/Tag.json").write_text("{}")
    (folder / "arrow/segment.txt").unlink()
    (folder / "dataset/Gone.json").write_text("{}")
    assert tool().main(["--check"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "schemas/arrow/segment.txt",
        "schemas/dataset/Gone.json",
        "schemas/dataset/Tag.json",
    ]
    assert tool().main([]) == 0
    assert tool().main(["--check"]) == 0


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.relative_to(SCHEMAS / "cases").as_posix())
def test_schema_and_decoder_judge_alike(case: Path) -> None:
    name = case.parent.relative_to(SCHEMAS / "cases").as_posix()
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    raw = case.read_bytes()
    try:
        decode(tool().documents()[name], raw, where=case.name)
        decoded = True
    except CorruptError:
        decoded = False
    valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(raw))
    assert decoded == valid == case.name.startswith("good-")


def test_there_are_good_and_bad_cases_of_each_stored_document_of_the_store() -> None:
    for name in tool().documents():
        if name.startswith("dataset/"):
            kinds = {case.name.split("-")[0] for case in (SCHEMAS / "cases" / name).glob("*.json")}
            assert kinds == {"good", "bad"}, name


def test_what_is_written_today_satisfies_the_schemas(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [[1, 2]])
    for name, file in (("DatasetInfo", "datastore.json"), ("Commit", "_log/00000000000000000001.json")):
        schema = json.loads((SCHEMAS / "dataset" / f"{name}.json").read_text())
        jsonschema.validate(json.loads((tmp_path / "set" / file).read_text()), schema)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a golden store, so that no test can touch the original."""
    return Path(shutil.copytree(request.param, tmp_path / "golden"))


def expected(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "expected.json").read_text())
    return found


def read(dataset: Dataset) -> list[dict[str, Any]]:
    found = []
    for index, info in enumerate(dataset.segments):
        values, offsets = dataset.token_shard(index)
        rows = [{**row, "digest": row["digest"].hex()} for row in dataset.documents(index).to_pylist()]
        tokens = [part.tolist() for part in np.split(values, offsets[1:-1])]
        found.append({"uid": info.uid, "tokens": tokens, "documents": rows})
    return found


def test_there_is_a_golden_store_of_every_format_version() -> None:
    assert [path.name for path in GOLDEN] == [f"v{version}" for version in range(1, Commit.newest_format + 1)]


def test_a_golden_store_reads_token_by_token(golden: Path) -> None:
    truth = expected(golden)["tokens"]
    url = golden / "tokens"
    for version, shards in truth["versions"].items():
        dataset = open_dataset(url, version=int(version))
        assert read(dataset) == shards
        assert dataset.tokenizer() == truth["tokenizer"].encode()
    assert open_dataset(url).uuid == truth["uuid"]
    assert open_dataset(url).version == len(truth["versions"])
    assert {name: open_dataset(url, tag=name).version for name in list_tags(dataset.storage)} == truth["tags"]


def test_the_history_of_a_golden_store_still_chains(golden: Path) -> None:
    dataset = open_dataset(golden / "tokens")
    log = CommitLog(dataset.storage)
    assert [commit.version for commit in log.history(dataset.commit)] == [2, 1]
    truth = expected(golden)["tokens"]["commits"]
    assert {version: log.stored(int(version)).sha256 for version in truth} == truth


def test_the_records_of_a_golden_store_read_row_by_row(golden: Path) -> None:
    truth = expected(golden)["records"]
    dataset = open_dataset(golden / "records")
    assert str(dataset.schema) == truth["schema"]
    rows = [
        {**row, "image": row["image"].hex() if row["image"] is not None else None} for row in dataset.iter_records()
    ]
    assert rows == truth["rows"]


def test_a_golden_store_verifies(golden: Path) -> None:
    for kind in ("tokens", "records"):
        report = verify(open_dataset(golden / kind))
        assert report.bad == ()


def test_a_golden_store_can_be_appended_to(golden: Path) -> None:
    dataset = open_dataset(golden / "records")
    with record_writer(golden / "records") as out:
        out.write(dataset.to_arrow())
    assert open_dataset(golden / "records").totals.documents == 2 * dataset.totals.documents

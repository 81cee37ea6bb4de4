"""Each kind of bad file, as the page of bad input lists them: nothing good is lost beside it, and nothing bad gets in."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import datastore as ds
from datastore.ingestion.settings import IngestSettings

ROOT = Path(__file__).parents[2]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bad_input", ROOT / "tools" / "bad_input.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool()
PAGE = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("case", TOOL.CASES, ids=lambda case: case.what)
def test_every_good_record_beside_a_bad_file_arrives_or_the_file_is_named(case: Any, tmp_path: Path) -> None:
    found = TOOL.outcome(case, tmp_path)
    rows = [row for row in PAGE if row.startswith(f"| {case.what} |")]
    assert rows == [f"| {case.what} | `{case.name}` | {TOOL._cells(found)} |"], "run python tools/bad_input.py"
    if found.code == 0:
        assert found.arrived == found.wanted
        return
    assert found.code == 1
    assert case.name in found.message
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").rglob("_log/*"))
    without = IngestSettings(exclude=(case.name,), workers=1)
    assert ds.ingest(str(tmp_path / "src"), str(tmp_path / "data"), settings=without).documents == 2


def test_the_page_has_no_other_cases() -> None:
    assert len([row for row in PAGE if row.startswith("| ")]) == len(TOOL.CASES) + 1
    assert len(TOOL.CASES) >= 40

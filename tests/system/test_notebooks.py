"""The notebooks of the docs: each runs from the first cell to the last in an empty folder, and shows what it is stored with."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "first-run" else [pytest.mark.slow])
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_from_end_to_end(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    stored = [kinds(cell) for cell in notebook.cells]
    assert any(stored)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [kinds(cell) for cell in notebook.cells] == stored


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Return what a cell shows, warnings apart: text, tables, pictures."""
    outputs = [each for each in cell.get("outputs", []) if each.get("name") != "stderr"]
    return {kind for each in outputs for kind in each.get("data", {"text": ""})}

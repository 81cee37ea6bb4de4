"""docs/types.md says what happens to each type: no cell of its table is believed, each is run."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "type_table.py"
PAGE = Path(__file__).parents[2] / "docs" / "types.md"


@pytest.mark.parametrize("arguments", [[], ["--without-pandas"]], ids=["pandas", "no pandas"])
def test_every_cell_of_the_page_is_what_happens(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| type |"))
    assert lines[start : lines.index("", start)] == done.stdout.splitlines()

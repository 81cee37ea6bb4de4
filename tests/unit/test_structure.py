"""The structure rules of `tools/structure.py` hold in this tree, and each of them finds what it is for."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_tree_keeps_the_rules(structure: ModuleType) -> None:
    assert structure.broken_rules(ROOT / "datastore") == []


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        ("x = 1\n" * 381, "more than 380 lines"),
        ("x = 1\n" * 59, "fewer than 60 lines"),
        ('"""What it is."""', 'begins with "What"'),
        ('"""TBD."""', 'begins with "TBD."'),
        ("def f(a, b, c, d, e, f, g): ...", "f takes 7 parameters"),
        ("class A:\n    def __init__(self, a, b, c, d, e, f, *, g): ...", "__init__ takes 7 parameters"),
        ("try: ...\nexcept Exception: pass", "catches everything"),
        ("try: ...\nexcept (OSError, BaseException): pass", "catches everything"),
        ("try: ...\nexcept: pass", "catches everything"),
        ("import pickle", "imports pickle"),
        ("from dill import loads", "imports dill.loads"),
        ("import os\nprint(os.environ['HOME'])", "uses os.environ"),
        ("from os import getenv", "uses os.getenv"),
        ("import time\ntime.sleep(1)", "uses time.sleep"),
    ],
)
def test_a_broken_rule_is_found(structure: ModuleType, tmp_path: Path, program: str, rule: str) -> None:
    (tmp_path / "module.py").write_text(program, encoding="utf-8")
    assert [found for found in structure.broken_rules(tmp_path) if rule in found]


@pytest.mark.parametrize(
    "program",
    [
        "def f(self, a, b, c, d, e, f): ...",
        "try: ...\nexcept Exception:\n    undo()\n    raise",
        "import os\nos.cpu_count()",
        "@click.command()\ndef f(a, b, c, d, e, f, g): ...",
    ],
)
def test_what_is_allowed_is_not_found(structure: ModuleType, tmp_path: Path, program: str) -> None:
    (tmp_path / "module.py").write_text(program + "\n" * structure.MIN_LINES, encoding="utf-8")
    assert structure.broken_rules(tmp_path) == []


def test_a_floor_shows_few_names_and_its_plan_names_each(structure: ModuleType, tmp_path: Path) -> None:
    floor = tmp_path / "floor"
    floor.mkdir()
    for number in range(16):
        (floor / f"room{number:02}.py").write_text("\n" * structure.MIN_LINES, encoding="utf-8")
    plan = "".join(f"    room{number:02}   a room\n" for number in range(16))
    (floor / "__init__.py").write_text(f'"""A floor.\n\n{plan}"""\n', encoding="utf-8")
    assert structure.broken_rules(tmp_path) == []
    (floor / "attic").mkdir()
    found = structure.broken_rules(tmp_path)
    assert [rule.rpartition(": ")[2] for rule in found] == [
        "the folder shows 17 names, more than 16",
        "the plan of the floor does not name attic",
    ]


def test_the_command_line_may_read_the_environment(structure: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "module.py").write_text(
        "import os\nos.environ\n" + "\n" * structure.MIN_LINES, encoding="utf-8"
    )
    assert structure.broken_rules(tmp_path) == []

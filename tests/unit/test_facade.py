"""What `import datastore` promises: it is instant, loads nothing heavy, and every public name is there on first use."""

import ast
import importlib
import inspect
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import datastore

HEAVY = {"torch", "pyarrow", "s3fs", "fsspec", "numpy", "tokenizers", "msgspec", "rich", "click"}
REPEATS = 7


def best_seconds(*words: str) -> float:
    """Return the least CPU time of several runs: the one that was least disturbed, whatever else the machine does."""
    times = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def loaded_by(program: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `program`."""
    code = f"{program}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_it_loads_nothing_heavy() -> None:
    assert loaded_by("import datastore") & HEAVY == set()


def test_importing_it_takes_less_than_a_tenth_of_a_second() -> None:
    bare = best_seconds(sys.executable, "-c", "pass")
    assert best_seconds(sys.executable, "-c", "import datastore") - bare < 0.1


def test_help_comes_in_less_than_three_tenths_of_a_second() -> None:
    assert best_seconds(sys.executable, "-m", "datastore", "--help") < 0.3


def test_help_loads_click_and_nothing_else_heavy() -> None:
    assert loaded_by("import datastore.cli.main") & HEAVY == {"click"}


def test_opening_a_dataset_loads_no_torch() -> None:
    assert "torch" not in loaded_by("import datastore as ds; ds.open, ds.Loader, ds.record_writer, ds.ingest")


@pytest.mark.parametrize("name", datastore.__all__)
def test_every_public_name_is_there(name: str) -> None:
    home, attribute = datastore._HOMES[name]
    assert getattr(datastore, name) is getattr(importlib.import_module(home), attribute)


def test_public_names_are_sorted_and_none_is_a_submodule() -> None:
    assert datastore.__all__ == sorted(datastore.__all__)
    folder = Path(datastore.__file__).parent
    submodules = {path.stem for path in folder.iterdir() if path.suffix in {"", ".py"}}
    assert set(datastore.__all__) & submodules == set()


def test_type_checkers_see_the_same_names_at_the_same_homes() -> None:
    tree = ast.parse(Path(datastore.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == datastore._HOMES


def test_whatever_takes_a_place_or_a_file_takes_a_path_and_a_text() -> None:
    places = {"url", "run", "runs", "to", "source", "target"}
    strict = [
        f"{name}({parameter.name}: {parameter.annotation})"
        for name in datastore.__all__
        if inspect.isfunction(function := getattr(datastore, name))
        for parameter in inspect.signature(function).parameters.values()
        if (
            parameter.name in places
            and "str" in str(parameter.annotation)
            and "PathLike" not in str(parameter.annotation)
        )
        or parameter.annotation is Path
    ]
    assert strict == []


def test_dir_lists_the_public_names_and_a_wrong_name_is_an_attribute_error() -> None:
    assert set(datastore.__all__) <= set(dir(datastore))
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        datastore.opne  # noqa: B018 - looking it up is the test


def test_the_version_is_the_installed_one() -> None:
    assert datastore.__version__.count(".") == 2


@pytest.mark.slow
def test_a_type_checker_knows_what_open_returns(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import datastore as ds\nreveal_type(ds.open('x'))\nds.Rank(rank='no')\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(program)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert 'Revealed type is "datastore.dataset.snapshot.Dataset"' in done.stdout
    assert 'Argument "rank" to "Rank" has incompatible type "str"' in done.stdout

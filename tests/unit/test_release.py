"""What is released says the same everywhere, and every extra is explained; the slow tests build and install it."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import datastore
from datastore.cli.begin import _EXTRAS, doctor
from datastore.cli.shell import CliSession, call

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FOR_WORK_ON_IT = {"docs", "dev"}
INSTALLED = {canonicalize_name(each.name) for each in metadata.distributions()}


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_stands_in_one_place() -> None:
    assert datastore.__version__ == metadata.version("llm-datastore") == PROJECT["version"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "datastore").rglob("*.py"))
    assert f'"{PROJECT["version"]}"' not in text


def test_the_page_explains_every_extra_and_what_it_brings() -> None:
    page = (ROOT / "docs" / "howto" / "install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    assert set(rows) == set(EXTRAS)
    for extra in EXTRAS.keys() - FOR_WORK_ON_IT:
        assert {name_of(each) for each in EXTRAS[extra]} == set(rows[extra].split(", ")), extra


def test_the_page_says_which_extras_bring_torch(release: ModuleType) -> None:
    page = (ROOT / "docs" / "howto" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|.*\| yes \|$", page, re.MULTILINE)) == release.WITH_TORCH | {"dev"}


def test_doctor_looks_for_what_each_extra_brings() -> None:
    known = {extra: set(names) for extra, names in _EXTRAS.items()}
    assert known == {extra: {name_of(each) for each in EXTRAS[extra]} for extra in EXTRAS.keys() - FOR_WORK_ON_IT}


def test_doctor_finds_all_of_them_where_they_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(doctor, ["--json"], CliSession()) == 0
    found = json.loads(capsys.readouterr().out)["extras"]
    for names in found.values():
        for name, version in names.items():
            assert (version is not None) == (canonicalize_name(name) in INSTALLED), name


def test_working_on_it_brings_every_extra() -> None:
    (own,) = [each for each in EXTRAS["dev"] if each.startswith(PROJECT["name"])]
    assert set(own.partition("[")[2].rstrip("]").split(",")) == EXTRAS.keys() - {"dev"}


def name_of(requirement: str) -> str:
    return Requirement(requirement).name


def needed(requirement: Requirement, found: set[str]) -> None:
    """Add to `found` what `requirement` brings here, and what that brings, and so on."""
    name = canonicalize_name(requirement.name)
    key = str(canonicalize_name(requirement.name)) + "".join(sorted(requirement.extras))
    if key in found:
        return
    found.update({key, name})
    for line in metadata.requires(name) or ():
        inner = Requirement(line)
        if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            needed(inner, found)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="constraints.txt is made with Python 3.11")
def test_all_that_the_tools_install_is_pinned() -> None:
    found: set[str] = set()
    needed(Requirement(f"{PROJECT['name']}[dev]"), found)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    assert (found & INSTALLED) - pinned - {PROJECT["name"]} == set()


def test_a_file_that_does_not_belong_into_the_wheel_is_found(release: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not what git has"):
        release.check_contents(*_archives(tmp_path, ["datastore/stray.py"]))


def _archives(folder: Path, names: list[str]) -> tuple[Path, Path]:
    import tarfile
    import zipfile

    with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    with tarfile.open(folder / "x.tar.gz", "w:gz"):
        pass
    return folder / "x.tar.gz", folder / "x.whl"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_built_looked_at_and_installed_alone(tmp_path: Path) -> None:
    """In a copy: a build folder in the clone would be in the way of another run."""
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs into the wheel is what git has")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", tmp_path / "clone"], check=True)
    for name in ("tools/release.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / "clone" / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, tmp_path / "clone" / "tools" / "release.py", "", "chat"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to be uploaded" in done.stdout

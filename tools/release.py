"""Build what is released, look at what was built, and install it with each extra alone. Called by `tools/release`.

    tools/release                everything; some ten minutes
    tools/release chat s3        only with these extras
    tools/release --build        no installation

Each check is a line; the first that fails ends it with what was wrong.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

WITH_TORCH = {"torch", "compress"}
"""Extras that bring torch. With PyPI's torch for Linux, CUDA comes along; docs/howto/install.md says how to avoid it."""

NOT_ALONE = {"dev"}
"""It is what tools/_setup installs."""

SMOKE = """
import datastore as ds
ds.ingest([{"text": "a b c"}, {"text": "d e f"}], "data")
loader = ds.RowLoader(ds.open("data"), global_batch=2)
assert sorted(next(loader).data["text"].to_pylist()) == ["a b c", "d e f"]
assert not ds.verify(ds.open("data")).bad
"""
"""What the plain package must do."""


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a command without the variables that change which Python code it finds; end with its output if it fails."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd or ROOT,
        env=plain,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Build into `folder`, the wheel from the sdist; return sdist and wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return only(folder, "*.tar.gz"), only(folder, "*.whl")


def only(folder: Path, pattern: str) -> Path:
    """Return the one file in `folder` that `pattern` means."""
    (found,) = folder.glob(pattern)
    return found


def check_contents(sdist: Path, wheel: Path) -> str:
    """Demand that the wheel holds the package, and nothing of the repository beside it."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = set(run("git", "ls-files", "datastore").split())
    packed = {name for name in names if name.startswith("datastore/")}
    demand(packed == tracked, f"not what git has: {sorted(packed ^ tracked)[:9]}")
    demand("datastore/py.typed" in packed, "type checkers need py.typed")
    rest = {name for name in names - packed if ".dist-info/" not in name}
    demand(not rest, f"not of the package: {sorted(rest)[:9]}")
    demand(any(name.endswith(".dist-info/licenses/LICENSE") for name in names), "the license is missing")
    with tarfile.open(sdist) as archive:
        parts = {name.partition("/")[2].partition("/")[0] for name in archive.getnames()}
    demand({"datastore", "tests", "schemas", "docs", "pyproject.toml"} <= parts, f"the sdist lacks parts: {parts}")
    return f"{len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB; sdist {sdist.stat().st_size / 1e6:.1f} MB"


def check_same_wheel(wheel: Path) -> str:
    """Demand that the sources make the very wheel that the sdist made."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
        demand(only(Path(folder), "*.whl").read_bytes() == wheel.read_bytes(), "sdist and sources make other wheels")
    return "byte for byte"


def check_metadata(sdist: Path, wheel: Path) -> str:
    """Demand one version everywhere, and what an index wants to know."""
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    head = HeaderParser().parsestr(archive.read(name).decode())
    version = PROJECT["version"]
    demand(head["Version"] == version and f"-{version}" in sdist.name, f"{head['Version']} is not {version}")
    demand("](docs/" not in head.get_payload(), "the description has links that lead nowhere on an index")
    demand(set(head.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"]), "extras differ")
    return f"{head['Name']} {version}"


def check_install(wheel: Path, extra: str) -> str:
    """Install into an environment of its own, with one extra or (empty) none, and try it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "venv"
        venv.create(home, with_pip=True)
        python, command = home / "bin" / "python", home / "bin" / "datastore"
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
        run(*pip, "install", "--only-binary", ":all:", "-c", ROOT / "constraints.txt", wanted, cwd=Path(folder))
        run(*pip, "check")
        demand(PROJECT["version"] in run(command, "--version", cwd=Path(folder)), "the command has another version")
        run(command, "--help", cwd=Path(folder))
        found = json.loads(run(command, "doctor", "--json", cwd=Path(folder)))["extras"].get(extra, {})
        demand(None not in found.values(), f"missing: {found}")
        check_no_torch(run(python, "-m", "pip", "list", "--format", "freeze"), extra)
        if not extra:
            run(python, "-c", SMOKE, cwd=Path(folder))
        size = sum(path.lstat().st_size for path in home.rglob("*"))
        return f"{size / 1e6:,.0f} MB"


def check_no_torch(listed: str, extra: str) -> None:
    """Demand that torch is there where it belongs, and CUDA nowhere but with it."""
    names = {line.partition("==")[0].lower() for line in listed.splitlines()}
    demand("numpy" in names, f"not a list of packages: {listed[:200]}")
    demand(("torch" in names) == (extra in WITH_TORCH), f"[{extra}] and torch: {'torch' in names}")
    cuda = {name for name in names if name.startswith(("nvidia-", "triton"))}
    demand(not cuda or extra in WITH_TORCH, f"[{extra}] brings {sorted(cuda)}")


def demand(condition: bool, otherwise: str) -> None:  # noqa: FBT001 - reads like `assert`
    """End with `otherwise` if `condition` does not hold."""
    if not condition:
        sys.exit(otherwise)


def told(name: str, check: Callable[..., str], *arguments: object) -> None:
    """Print a line about one check."""
    print(f"{name:<20} ", end="", flush=True)
    started = time.monotonic()
    found = check(*arguments)
    print(f"{time.monotonic() - started:6.1f} s  {found}", flush=True)


def main(words: list[str]) -> int:
    """Do what `words` ask for."""
    extras = ["", *(extra for extra in PROJECT["optional-dependencies"] if extra not in NOT_ALONE)]
    unknown = sorted(set(words) - set(extras) - {"--build"})
    demand(not unknown, f"no such extra: {', '.join(unknown)}")
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, wheel = build(DIST)
    told("contents", check_contents, sdist, wheel)
    told("wheel of the sources", check_same_wheel, wheel)
    told("metadata", check_metadata, sdist, wheel)
    for extra in words or extras:
        if "--build" not in words:
            told(f"install [{extra}]" if extra else "install", check_install, wheel, extra)
    print(f"ready to be uploaded: {sdist.relative_to(ROOT)} {wheel.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

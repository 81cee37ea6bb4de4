"""Run the checks in the order in which they are quick, print one line for each, and what the failing ones said.

Called by `tools/check`, which has made the environment.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DOCS = "tests/unit/test_docs.py"

CHECKS: dict[str, list[str]] = {
    "lint": [f"{BIN}/ruff", "check", "."],
    "format": [f"{BIN}/ruff", "format", "--check", "."],
    "structure": [sys.executable, "tools/structure.py"],
    "layers": [f"{BIN}/lint-imports"],
    "schemas": [sys.executable, "tools/schemas.py", "--check"],
    "types": [f"{BIN}/mypy"],
    "site": [sys.executable, "tools/site/build.py"],
    "docs": [sys.executable, "-m", "pytest", "-q", DOCS],
    "tests": ["tools/test", f"--ignore={DOCS}"],
}
"""Each check and its command."""


def main(names: list[str]) -> int:
    """Run the checks called `names` (all of them if there is no name); return 1 if any failed."""
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        print(f"no such check: {', '.join(unknown)} (there are: {', '.join(CHECKS)})", file=sys.stderr)
        return 2
    failed = [name for name in CHECKS if (not names or name in names) and not _passes(name)]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def _passes(name: str) -> bool:
    started = time.monotonic()
    done = subprocess.run(
        CHECKS[name], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    good = done.returncode == 0
    lines = done.stdout.strip().splitlines() or [""]
    word = lines[-1].strip("= ") if name in {"tests", "docs", "site"} else ""
    print(f"{'ok  ' if good else 'FAIL'}  {name:<10} {time.monotonic() - started:6.1f} s  {word}".rstrip(), flush=True)
    if not good:
        print("\n".join(f"      {line}" for line in lines), flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Build the documentation as a site, strict: a link that leads nowhere, or a page in no menu, is an error.

    python tools/site/build.py [FOLDER]        build/site if it is left out

What is built is then looked through: a page that would ask another server for a script, a style, a font or a picture when it
is opened is an error, too. So the folder can be read anywhere, from a disk, without a network.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "tools" / "site" / "mkdocs.yml"
FOLDER = ROOT / "build" / "site"

_OUTSIDE = r"""["'](?:https?:)?//[^"']+["']"""
_REQUESTS = (
    re.compile(rf"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc={_OUTSIDE}[^>]*>"),
    re.compile(rf"<link\b(?![^>]*\brel=[\"']?(?:canonical|alternate|prev|next)\b)[^>]*\bhref={_OUTSIDE}[^>]*>"),
    re.compile(r"<[^>]*\bdata-md-component=[\"']?source\b[^>]*>"),  # for it a script asks api.github.com
    re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+"),
)
"""What a browser fetches without being asked, in HTML and in CSS."""


def build(folder: Path) -> None:
    """Build the site into `folder`, which is emptied first; exit with what mkdocs said if it found anything wrong."""
    command = [sys.executable, "-m", "mkdocs", "build", "--clean", "--config-file", CONFIG, "--site-dir", folder]
    # Material prints advertisements for its successor otherwise.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def outside_requests(folder: Path) -> Iterator[str]:
    """Yield each request to another server that a file below `folder` makes when a browser opens it."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".html", ".css"}:
            text = path.read_text(encoding="utf-8")
            for pattern in _REQUESTS:
                yield from (f"{path.relative_to(folder)}: {found[0][:200]}" for found in pattern.finditer(text))


def main() -> int:
    """Build, look through what was built, and say where it is."""
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else FOLDER
    build(folder)
    outside = list(outside_requests(folder))
    sys.stdout.writelines(f"asks another server: {line}\n" for line in outside)
    pages = sum(1 for _ in folder.rglob("*.html"))
    sys.stdout.write(f"{pages} pages; open {folder / 'index.html'}\n")
    return 1 if outside or not pages else 0


if __name__ == "__main__":
    sys.exit(main())

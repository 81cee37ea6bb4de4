"""Write schemas/ from the code: a JSON Schema for every stored document, the Arrow schemas of shards as text.

`python tools/schemas.py` writes them; with `--check` it writes nothing, and exits with 1 if a file is not what would
be written or describes nothing any more. Stored documents are found, not listed: every `Sealed` class of the package.
"""

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import datastore
from datastore.dataset.shards.parity_groups import PARITY_SCHEMA
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA
from datastore.document import Sealed, json_schema
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokens import token_schema

ROOT = Path(__file__).resolve().parent.parent / "schemas"
KEPT = ("cases/", "golden/")
"""Folders of data that people wrote, not this tool."""

SKIPPED = ("datastore.__main__", "datastore.cli", "datastore.testing")
"""Modules that store nothing of their own."""

ARROW = {
    "token-shard-uint16": token_schema("uint16"),
    "token-shard-uint32": token_schema("uint32"),
    "documents": DOCUMENTS_SCHEMA,
    "parity": PARITY_SCHEMA,
    "segment": SEGMENT_SCHEMA,
}


def documents() -> dict[str, type[Sealed]]:
    """Return every stored document of the package by `<package>/<class>`."""
    for module in pkgutil.walk_packages(datastore.__path__, "datastore."):
        if not module.name.startswith(SKIPPED):
            importlib.import_module(module.name)
    found: dict[str, type[Sealed]] = {}
    for kind in descendants(Sealed):
        if kind.__module__.startswith("datastore."):
            name = f"{kind.__module__.split('.')[1]}/{kind.__name__}"
            if name in found:
                sys.exit(f"error: two stored documents are called {name}; rename one of them")
            found[name] = kind
    return found


def descendants(kind: type[Sealed]) -> Iterator[type[Sealed]]:
    """Yield all subclasses of `kind`, at any depth."""
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def expected() -> dict[str, str]:
    """Return what belongs into schemas/, by file name."""
    files = {
        f"{name}.json": json.dumps(json_schema(kind), indent=2, ensure_ascii=False) + "\n"
        for name, kind in documents().items()
    }
    return files | {f"arrow/{name}.txt": f"{schema}\n" for name, schema in ARROW.items()}


def present() -> dict[str, str]:
    """Return what is in schemas/, by file name."""
    files = (path for path in ROOT.rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    return {name: path.read_text(encoding="utf-8") for name, path in names.items() if not name.startswith(KEPT)}


def main(arguments: list[str]) -> int:
    """Write, or with `--check` compare; return the exit status."""
    wanted, found = expected(), present()
    stale = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if "--check" in arguments:
        for name in stale:
            print(f"schemas/{name} is not what the code says; run: python tools/schemas.py")
        return 1 if stale else 0
    for name in stale:
        path = ROOT / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
        print(f"{'wrote' if name in wanted else 'removed'} schemas/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The structure rules of the house that no linter has: one line for each place that breaks one.

    python tools/structure.py [FOLDER]

A folder below the top shows at most 16 names, and the docstring of its `__init__` is the plan of that floor: it names each
of them. A module has 60 to 380 lines, a few with a reason fewer, and its docstring says what it is: it begins neither with
"What" nor with "TBD". Functions have at most 6 parameters; nothing is pickled; no `except` catches everything without raising
again; below the command line nothing reads the environment and nothing sleeps (a wait must be interruptible).
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_NAMES = 16
MIN_LINES = 60
MAX_LINES = 380
MAX_PARAMETERS = 6
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNPICKLES = {"checkpoint/exchange/files.py": "the table of contents of DCP, with a list of what may be in it"}
EDGE_ONLY = {"os.environ", "os.getenv", "time.sleep"}
BLIND = {"Exception", "BaseException"}

SHORT = {
    "__main__.py": "an entry point",
    "host.py": "three facts that every document needs",
    "ingestion/importing.py": "an entry point",
    "ingestion/quality/filter.py": "the protocol of filters",
    "interop/formats.py": "a registry",
    "dataset/query/readable.py": "a protocol",
    "storage/rendezvous.py": "a pure function with its source",
    "training/session/request.py": "a record, handed to other processes",
    "training/objectives/catalog.py": "a registry",
    "cli/ranks.py": "the variables of launchers, and nothing else",
    "training/parallel/choose.py": "a registry",
    "training/parallel/elsewhere.py": "a pure function",
    "training/run/changes.py": "a list, and what follows from it",
    "training/parallel/norm.py": "a pure function with its reason",
}
"""Modules that may have fewer lines, and why."""


def broken_rules(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every Python module below `root`."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        found.extend(f"{path}:{rule}" for rule in _rules_of_module(path, text.count("\n"), tree, root))
        below_cli = "cli" not in path.relative_to(root).parts
        unpickles = path.relative_to(root).as_posix() in UNPICKLES
        for node in ast.walk(tree):
            rules = _rules(node, below_cli=below_cli, unpickles=unpickles)
            found.extend(f"{path}:{node.lineno}: {rule}" for rule in rules)  # type: ignore[attr-defined]
    return found


def _rules_of_module(path: Path, lines: int, tree: ast.Module, root: Path) -> Iterator[str]:
    docstring = ast.get_docstring(tree) or ""
    if re.match(r"What\b|TBD", docstring):
        yield f'1: the docstring begins with "{docstring.split()[0]}"; begin with a noun or an imperative'
    if lines > MAX_LINES:
        yield f"{lines}: the module has more than {MAX_LINES} lines; split it"
    if path.name == "__init__.py":
        yield from _rules_of_floor(path.parent, docstring) if path.parent != root else ()
    elif lines < MIN_LINES and path.relative_to(root).as_posix() not in SHORT:
        yield f"{lines}: the module has fewer than {MIN_LINES} lines; it belongs to another, or into SHORT with a reason"


def _rules_of_floor(folder: Path, plan: str) -> Iterator[str]:
    names = sorted(
        path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir() if not path.name.startswith("_")
    )
    if len(names) > MAX_NAMES:
        yield f"1: the folder shows {len(names)} names, more than {MAX_NAMES}"
    missing = [name for name in names if not re.search(rf"^ *(?:\w+, )*{name}\b", plan, re.MULTILINE)]
    if missing:
        yield f"1: the plan of the floor does not name {', '.join(missing)}"


def _rules(node: ast.AST, *, below_cli: bool, unpickles: bool) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from _too_many_parameters(node)
    if isinstance(node, ast.ExceptHandler) and _swallows_everything(node):
        yield "catches everything and does not raise again"
    names = _names(node)
    if not unpickles:
        yield from (f"imports {name}" for name in names if name.partition(".")[0] in PICKLES)
    if below_cli:
        yield from (f"uses {name} below the command line" for name in names if name in EDGE_ONLY)


def _names(node: ast.AST) -> list[str]:
    """Return the dotted names that `node` imports, or the one that it looks up in a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return [f"{node.value.id}.{node.attr}"]
    return []


def _too_many_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = len([argument for argument in arguments if argument.arg not in {"self", "cls"}])
    if count > MAX_PARAMETERS and not _is_command(node):
        yield f"{node.name} takes {count} parameters, more than {MAX_PARAMETERS}"


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command of the command line has one parameter for each of its options; click calls it by name."""
    return any("command" in ast.unparse(decorator) for decorator in node.decorator_list)


def _swallows_everything(node: ast.ExceptHandler) -> bool:
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    blind = any(kind is None or (isinstance(kind, ast.Name) and kind.id in BLIND) for kind in kinds)
    return blind and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))


if __name__ == "__main__":
    problems = broken_rules(Path(sys.argv[1] if len(sys.argv) > 1 else "datastore"))
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    sys.exit(bool(problems))

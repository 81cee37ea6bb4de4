"""The structure rules of the house that no linter has: one line for each place that breaks one.

    python tools/structure.py [FOLDER]

Modules have at most 400 lines and functions at most 6 parameters; nothing is pickled; no `except` catches everything without raising
again; below the command line nothing reads the environment and nothing sleeps (a wait must be interruptible).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 400
MAX_PARAMETERS = 6
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
EDGE_ONLY = {"os.environ", "os.getenv", "time.sleep"}
BLIND = {"Exception", "BaseException"}


def broken_rules(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every Python module below `root`."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MAX_LINES:
            found.append(f"{path}:{lines}: the module has more than {MAX_LINES} lines; split it")
        below_cli = "cli" not in path.relative_to(root).parts
        for node in ast.walk(ast.parse(text, filename=str(path))):
            found.extend(f"{path}:{node.lineno}: {rule}" for rule in _rules(node, below_cli=below_cli))  # type: ignore[attr-defined]
    return found


def _rules(node: ast.AST, *, below_cli: bool) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from _too_many_parameters(node)
    if isinstance(node, ast.ExceptHandler) and _swallows_everything(node):
        yield "catches everything and does not raise again"
    names = _names(node)
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

"""The pages of the API name everything that is public, and the site shows them as they are meant, without a network."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import datastore

ROOT = Path(__file__).parents[2]
SITE = ROOT / "tools" / "site"
REPOSITORY = "https://example.org/us"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def api() -> ModuleType:
    return load(ROOT / "tools" / "api.py")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    return load(SITE / "hooks.py")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load(SITE / "build.py")


def test_the_pages_of_the_api_are_what_the_docstrings_say(api: ModuleType) -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in api.FOLDER.glob("*.md")}
    assert pages == api.pages(), "run python tools/api.py"


def test_every_public_name_is_on_one_page(api: ModuleType) -> None:
    named = [name for topic in api.TOPICS.values() for name in topic.names]
    assert sorted(named) == sorted(datastore.__all__), "name it in TOPICS of tools/api.py, then run it"


def unexplained(function: Callable[..., Any]) -> set[str]:
    """Return the parameters that the docstring of `function` does not name, in backticks or below `Args:`."""
    text = inspect.getdoc(function) or ""
    named = " ".join(re.findall(r"`([^`]+)`", text) + re.findall(r"^    (\w+): ", text, re.MULTILINE))
    taken = set(inspect.signature(function).parameters) - {"self", "cls"}
    return {name for name in taken if not re.search(rf"\b{name}\b", named)}


FUNCTIONS = [name for name in datastore.__all__ if inspect.isfunction(getattr(datastore, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_each_argument_is_and_which_errors_there_are(name: str) -> None:
    function = getattr(datastore, name)
    assert unexplained(function) == set()
    assert "Raises:" in (inspect.getdoc(function) or "")


def methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public methods of public classes, but for those whose arguments the class above explains."""
    for name in datastore.__all__:
        kind = getattr(datastore, name)
        for method, value in vars(kind).items() if inspect.isclass(kind) else ():
            function = inspect.unwrap(getattr(value, "__func__", value))
            stated_above = getattr(function, "__override__", False)
            if inspect.isfunction(function) and not method.startswith("_") and not stated_above:
                yield f"{name}.{method}", getattr(kind, method)


@pytest.mark.parametrize(("name", "function"), list(methods()))
def test_a_method_says_what_each_argument_is(name: str, function: Callable[..., Any]) -> None:
    assert unexplained(function) == set(), name


MADE_BY_FUNCTIONS = {"Dataset", "FileRows"}
EXPLAINED_ON_PAGES = {"Checkpointer", "DcpReader", "DcpWriter"}


def values_of(kind: type) -> set[str]:
    """Return what makes a value of `kind`: the arguments, or the fields that it declares itself."""
    if dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct):
        return {name for name in vars(kind).get("__annotations__", {}) if not name.startswith("_")}
    return set(inspect.signature(kind).parameters) if "__init__" in vars(kind) else set()


def explained_fields(kind: type) -> set[str]:
    """Return the fields of `kind` below which a text stands."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    return {
        each.target.id
        for each, below in pairwise(body)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and isinstance(below, ast.Expr)
    }


CLASSES = [
    name
    for name in datastore.__all__
    if inspect.isclass(kind := getattr(datastore, name)) and not issubclass(kind, Exception)
]


@pytest.mark.parametrize("name", sorted(set(CLASSES) - MADE_BY_FUNCTIONS - EXPLAINED_ON_PAGES))
def test_a_class_says_what_each_of_its_values_is(name: str) -> None:
    kind = getattr(datastore, name)
    text = " ".join(re.findall(r"`([^`]+)`", (inspect.getdoc(kind) or "") + (kind.__init__.__doc__ or "")))
    missing = values_of(kind) - explained_fields(kind)
    assert {each for each in missing if not re.search(rf"\b{each}\b", text)} == set()


def for_site(hooks: ModuleType, text: str, page: str = "howto/ingest.md") -> str:
    return str(hooks.for_site(text, (ROOT / "docs" / page).parent, REPOSITORY))


def test_links_out_of_the_pages_lead_to_the_repository(hooks: ModuleType) -> None:
    assert for_site(hooks, "[a](../../datastore/errors.py#L3)") == f"[a]({REPOSITORY}/blob/main/datastore/errors.py#L3)"
    assert for_site(hooks, "[a](../recipes/)") == f"[a]({REPOSITORY}/tree/main/docs/recipes)"
    for kept in ("[a](../order.md#lanes)", "[a](engines.md)", "[a](#here)", "[a](https://example.org/x)"):
        assert for_site(hooks, kept) == kept


def test_a_table_of_the_api_leads_to_the_docstrings_below_it(hooks: ModuleType) -> None:
    page = "| [`ds.open`](../../datastore/x.py) | Return ... |\n\n<!-- api: datastore.open -->"
    shown = for_site(hooks, page, "api/datasets.md")
    assert shown == "| [`ds.open`](#datastore.open) | Return ... |\n\n::: datastore.open"


def test_a_pipe_in_the_code_of_a_table_loses_the_backslash_that_github_needs(hooks: ModuleType) -> None:
    assert for_site(hooks, "| `[a\\|b]` | a \\| b |\n`[a\\|b]`") == "| `[a|b]` | a \\| b |\n`[a\\|b]`"


def test_what_belongs_to_an_item_stays_in_it(hooks: ModuleType) -> None:
    markdown = pytest.importorskip("markdown")
    text = for_site(hooks, "1. One.\n\n   | a | b |\n   |---|---|\n   | 1 | 2 |\n2. Two,\n   and more.\n")
    html = markdown.markdown(text, extensions=["tables"])
    assert html.count("<li>") == 2
    assert html.count("<table>") == html.count("<ol>") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        '<script src="https://unpkg.com/iframe-worker/shim"></script>',
        '<img alt="" src="//example.org/a.png">',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
        '<a href="https://github.com/x/y" class="md-source" data-md-component="source">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>a { background: url(https://example.org/a.png) }</style>",
    ],
)
def test_a_request_to_another_server_is_found(build: ModuleType, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "page.html").write_text(f"<html>{wrong}</html>", encoding="utf-8")
    assert len(list(build.outside_requests(tmp_path))) == 1


def test_links_and_own_files_are_no_such_requests(build: ModuleType, tmp_path: Path) -> None:
    page = '<a href="https://example.org">x</a><script src="assets/a.js"></script><link rel="canonical" href="https://x.org">'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert list(build.outside_requests(tmp_path)) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, SITE / "build.py", folder], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_public_name_and_asks_no_other_server(build: ModuleType, site: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    anchors = set(re.findall(r'id="datastore\.(\w+)"', text))
    assert set(datastore.__all__) <= anchors
    assert list(build.outside_requests(site)) == []


PARTS = ("li", "ol", "ul", "table", "tr", "td", "h2", "h3", "strong", "em", "pre", "code")


def parts(html: str) -> dict[str, int]:
    """Return how many parts of each kind a page has; what lies within a block of code does not count."""
    blocks = html.count("<pre>")
    html = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    return {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in PARTS} | {"pre": blocks}


def test_the_site_shows_of_each_page_what_github_shows(site: Path) -> None:
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table"])
    docs = ROOT / "docs"
    for page in sorted(docs.rglob("*.md")):
        if page.parent.name == "api":
            continue
        html = (site / page.relative_to(docs).with_suffix(".html")).read_text(encoding="utf-8")
        article = html[html.index("<article") : html.index("</article>")]
        article = re.sub(r'<div class="highlight.*?</div>', "<pre></pre>", article, flags=re.DOTALL)
        assert parts(article) == parts(reader.render(page.read_text(encoding="utf-8"))), page


def test_a_link_that_leads_nowhere_is_an_error(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[lost](nowhere.md)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\nplugins: []\n", encoding="utf-8")
    monkeypatch.setattr(build, "CONFIG", tmp_path / "mkdocs.yml")
    with pytest.raises(SystemExit, match=r"nowhere\.md"):
        build.build(tmp_path / "site")

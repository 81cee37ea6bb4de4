r"""Turn pages that GitHub shows well into pages that the site shows well, while mkdocs builds it.

- A link to something outside docs/, or to a folder, leads to the repository.
- A comment `<!-- api: datastore.open -->` makes room for the docstring of that name; links to names lead to that place.
- "```python slow" becomes "```python": the second word is for the tests, and with it Python-Markdown sees no block of code.
- What belongs to an item of a list is indented by four spaces, which Python-Markdown wants; GitHub is content with two or three.
- Search finds what says how to do something before what says how it was decided or measured.
- In the code of a table `\|` becomes `|`: GitHub needs the backslash there, Python-Markdown would show it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

BOOSTS = {"tutorial": 3, "howto/": 2, "commands": 2, "troubleshooting": 2}
BOOSTS |= dict.fromkeys(("decisions/", "changelog", "benchmarks", "comparison"), 0.3)
"""How much a page counts in a search, by how its name begins; the others count 1."""

RECORDS = {"Keep", "Rank", "Rows", "Stage", "Stratified", "Weighted", "Cluster"}
"""Classes that are made of values, beside those that are called Settings."""

_FENCED = re.compile(r"^(```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
_API_LINK = re.compile(r"(\[`ds\.(\w+)`\])\([^)]*\)")
_MARK = re.compile(r"^(```\w+) .*$", re.MULTILINE)
_API = re.compile(r"^<!-- api: (\S+) -->$", re.MULTILINE)
_INDENT = re.compile(r"^ {2,3}(?=\S)", re.MULTILINE)
_ITEM = re.compile(r"(?:-|\d+\.) ")
_CODE = re.compile(r"`[^`]+`")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the Markdown of `page` as Python-Markdown and the site need it."""
    del files
    begins = next((start for start in BOOSTS if page.file.src_uri.startswith(start)), None)
    if begins:
        page.meta["search"] = {"boost": BOOSTS[begins]}
    folder, repository = (DOCS / page.file.src_uri).parent, config.extra["repository"]
    parts = _FENCED.split(markdown)
    return "".join(
        _MARK.sub(r"\1", part) if part.startswith("```") else for_site(part, folder, repository) for part in parts
    )


def for_site(text: str, folder: Path, repository: str) -> str:
    """Return `text`, the prose of a page in `folder`, as the site needs it."""

    def lead(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2]
        target = (folder / path).resolve()
        if target.is_relative_to(DOCS) and not target.is_dir():
            return path + anchor
        kind = "tree" if target.is_dir() else "blob"
        return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor}"

    if _API.search(text):
        text = _API_LINK.sub(r"\1(#datastore.\2)", text)
        text = _API.sub(lambda found: _place(found[1]), text)
    lines = [_bare_pipes(line) if line.lstrip().startswith("|") else line for line in _items(text).split("\n")]
    return _LINK.sub(lead, "\n".join(lines))


def _place(name: str) -> str:
    """Return what makes room for the docstring of `name`; of a record its defaults are shown, too."""
    shown = f"::: {name}"
    if name.endswith("Settings") or name.rpartition(".")[2] in RECORDS:
        shown += "\n    options:\n      show_attribute_values: true"
    return shown


def _items(text: str) -> str:
    """Return `text` with items of lists as Python-Markdown tells them: indented by four, and set apart after a second paragraph."""
    lines: list[str] = []
    has_parts = False
    for line in _INDENT.sub("    ", text).split("\n"):
        after_blank = bool(lines) and not lines[-1].strip()
        if _ITEM.match(line):
            if has_parts and not after_blank:
                lines.append("")
            has_parts = False
        elif after_blank and line.strip():
            has_parts = line.startswith("    ")
        lines.append(line)
    return "\n".join(lines)


def _bare_pipes(row: str) -> str:
    return _CODE.sub(lambda code: code[0].replace("\\|", "|"), row)

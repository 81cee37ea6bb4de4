"""The page of settings has each setting with its default, whatever the tool that writes it does."""

import importlib
import importlib.util
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import datastore
from datastore.document import SettingsDocument

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "tools" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records() -> Iterator[type[SettingsDocument]]:
    """Yield every record of settings that the package declares."""
    for module in pkgutil.walk_packages(datastore.__path__, "datastore."):
        if not module.name.startswith(("datastore.__main__", "datastore.testing")):
            importlib.import_module(module.name)
    for kind in SettingsDocument.__subclasses__():
        if kind.__module__.startswith("datastore."):
            yield kind


def test_the_page_is_what_the_code_says(tool: ModuleType) -> None:
    assert PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/settings.py"


def test_every_setting_is_on_the_page_with_its_default_and_a_meaning() -> None:
    rows: dict[str, list[list[str]]] = {}
    for row in re.findall(r"^\| `(.*?)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        key = re.split(r"[.:] ?", row[0])[-1]
        rows.setdefault(key, []).append(re.split(r" (?<!\\)\| ", row[1]))
    found = list(records())
    assert len(found) > 12
    for kind in found:
        for field in msgspec.structs.fields(kind):
            if isinstance(field.type, type) and issubclass(field.type, SettingsDocument):
                continue
            assert field.name in rows, f"{kind.__name__}.{field.name}"
            value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            shown = {cells[0].partition(" (")[0].replace("\\|", "|") for cells in rows[field.name]}
            expected = "must be given" if field.required else written(value)
            assert expected in shown, f"{kind.__name__}.{field.name} = {value}"
            assert all(cells[2] for cells in rows[field.name]), f"{kind.__name__}.{field.name} says nothing"


def written(value: object) -> str:
    """Return a default as the page has it."""
    if value is None:
        return "none"
    if isinstance(value, dict) and value:
        return "`{ " + ", ".join(f'{name} = "{inner}"' for name, inner in value.items()) + " }`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"

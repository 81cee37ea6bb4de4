"""What system tests share: programs that other processes import from this folder, and a small dataset of text."""

from pathlib import Path

import pytest

from datastore.testing.examples import make_language

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and objectives of this folder are found by their names, in processes that a test starts, too."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a dataset that tests only read."""
    url = tmp_path_factory.mktemp("language")
    make_language(url)
    return str(url)

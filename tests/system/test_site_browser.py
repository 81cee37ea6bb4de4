"""The documentation as whoever opens the folder sees it: from a disk, in a browser, without a network."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright")
pytest.importorskip("mkdocs")
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the site is, as a URL of a file."""
    folder = tmp_path_factory.mktemp("site") / "site"
    words = [sys.executable, ROOT / "tools" / "site" / "build.py", folder]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder.as_uri()


@pytest.fixture
def page() -> Iterator[Page]:
    """A page that must neither ask anybody for anything nor complain."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page()
        found.on("request", lambda request: complaints.append(request.url) if "://" in request.url[:8] else None)
        found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: complaints.append(str(error)))
        yield found
        browser.close()
    assert [each for each in complaints if not each.startswith("file://")] == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("put-if-absent", "Commits by put-if-absent"),
        ("load_state_dict", "Batches out"),
        ("error[corrupt]", "Errors by their code"),
        ("--max-reject-ratio", "Bring text in"),
        ("kubernetes", "From a laptop to a cluster"),
    ],
)
def test_search_finds_what_people_look_for(address: str, page: Page, words: str, found: str) -> None:
    page.goto(f"{address}/index.html")
    field = page.locator("[data-md-component=search-query]")
    field.click()
    field.press_sequentially(words)
    expect(page.locator(".md-search-result__item").filter(has_text=found).first).to_be_visible(timeout=15_000)


def test_a_name_in_a_table_leads_to_its_docstring(address: str, page: Page) -> None:
    page.goto(f"{address}/api/datasets.html")
    page.get_by_role("link", name="ds.verify", exact=True).click()
    expect(page.locator("[id='datastore.verify']")).to_be_in_viewport()


def test_the_keyboard_is_enough_to_get_from_the_first_page_to_the_tutorial(address: str, page: Page) -> None:
    page.goto(f"{address}/index.html")
    page.keyboard.press("/")
    expect(page.locator("[data-md-component=search-query]")).to_be_focused()
    page.keyboard.type("tutorial")
    expect(page.locator(".md-search-result__item").first).to_be_visible(timeout=15_000)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("Tutorial", timeout=15_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_where_the_machine_is(address: str, page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(f"{address}/index.html")
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate" if scheme == "dark" else "default")

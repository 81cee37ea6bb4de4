"""The page in a browser: Debian's Chromium, driven by Playwright. Plots draw, searches find, what is new appears, keys work.

With `SCREENSHOTS=FOLDER` in the environment the pictures of the docs are written there.
"""

import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

import datastore as ds

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.timeout(180),
    pytest.mark.xdist_group("browser"),
]

WIDE = {"width": 1200, "height": 860}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own sources as a dataset, and two runs, one of which was resumed."""
    root = tmp_path_factory.mktemp("browser")
    if os.environ.get("SCREENSHOTS"):  # A path that suits a picture.
        root = Path("/tmp/corpus")
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
    sources = root / "src"
    for name in ("json", "email", "asyncio", "http", "logging"):
        shutil.copytree(Path(os.__file__).parent / name, sources / name)
    tokenizer = ds.train_tokenizer([str(sources)], settings=ds.TokenizerSettings(vocab_size=1_000))
    (root / "tok.json").write_bytes(tokenizer)
    settings = ds.IngestSettings(
        tokenizer=str(root / "tok.json"), include=("*.py",), shard_bytes=32_768, task_bytes=65_536
    )
    ds.ingest(sources, root / "data" / "code", settings=settings)
    ds.delete(root / "data" / "code", sources=["*/email/*"])
    recipe = Path(__file__).parents[2] / "docs" / "recipes" / "pretrain.toml"
    for name, rate in (("first", "3e-3"), ("second", "1e-3")):
        run = ds.load_settings(
            ds.RunSettings,
            recipe,
            overrides=[
                f"data.url={root}/data/code",
                f"optim.lr={rate}",
                "train.steps=30",
                "checkpoint.every=10",
                "eval.every=10",
            ],
        )
        ds.train(run, root / "runs" / name)
    return root


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` in a process of its own; give the address that the command prints."""
    command = [sys.executable, "-m", "datastore", "ui", str(folder), "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def address(ground: Path) -> Iterator[str]:
    with served(ground) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that has the cookie; whatever its console says, or it asks for elsewhere, fails the test."""
    context = browser.new_context(color_scheme=request.param, viewport=WIDE)
    found = context.new_page()
    wrong: list[str] = []
    found.on("console", lambda message: wrong.append(message.text) if "readback" not in message.text else None)  # Ours.
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith(address.split("/?", maxsplit=1)[0]) or asked.url.startswith("data:")
            else wrong.append(asked.url)
        ),
    )
    found.goto(address)
    yield found
    context.close()
    assert not wrong


def shot(page: Page, name: str) -> None:
    """Write a picture for the docs, if that is asked for; of the light pages."""
    folder = os.environ.get("SCREENSHOTS")
    if folder and page.evaluate("matchMedia('(prefers-color-scheme: light)').matches") == (name != "ui-run"):
        page.screenshot(path=f"{folder}/{name}.png")


def base(page: Page) -> str:
    return "/".join(page.url.split("/")[:3])


def drawn(page: Page, count: int) -> None:
    """Wait until so many plots show something: pixels of a line, not an empty canvas."""
    page.wait_for_function(
        """count => {
            const canvases = [...document.querySelectorAll('figure.plot canvas')];
            return canvases.length === count && canvases.every(canvas => {
                const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
                let coloured = 0;
                for (let i = 0; i < data.length; i += 4)
                    coloured += data[i + 3] > 200 && Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 60;
                return coloured > 50;
            });
        }""",
        arg=count,
        timeout=20_000,
    )


def test_the_first_page_leads_to_everything(page: Page) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("1 dataset, 2 runs")
    page.get_by_role("link", name="code").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("code")
    expect(page.locator(".timeline li")).to_have_count(2)
    shot(page, "ui-dataset")
    page.get_by_role("link", name="Shards").click()
    expect(page.locator("svg.map rect").first).to_be_visible()
    shot(page, "ui-shards")
    page.get_by_role("link", name="Plan").click()
    expect(page.locator("svg.plan g").first).to_be_visible()


def test_plots_of_runs_are_drawn_and_follow_the_choice(page: Page) -> None:
    page.goto(f"{base(page)}/runs")
    drawn(page, 1)
    figure = page.locator("figure.plot")
    expect(figure).to_have_attribute("data-points", "60")
    shot(page, "ui-runs")
    page.get_by_label("second").first.uncheck()
    expect(figure).to_have_attribute("data-points", "30")
    page.get_by_label("Number").select_option("validation_loss")
    expect(figure).to_have_attribute("data-points", "3")
    expect(figure.locator("figcaption")).to_contain_text("validation_loss")
    page.get_by_label("second").first.check()
    page.get_by_role("button", name="Compare settings").click()
    expect(page.get_by_role("rowheader", name="optim.lr")).to_be_visible()
    drawn(page, 1)


def test_a_run_shows_its_numbers_and_what_a_step_saw(page: Page) -> None:
    page.goto(f"{base(page)}/runs/0")
    drawn(page, 4)
    shot(page, "ui-run")
    page.get_by_label("More").select_option("grad_norm")
    drawn(page, 5)
    page.get_by_label("What did step").fill("7")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Step 7", timeout=20_000)
    expect(page.locator("pre.text").first).to_be_visible()
    shot(page, "ui-step")


def test_steps_that_are_new_appear_by_themselves(page: Page, ground: Path) -> None:
    page.goto(f"{base(page)}/runs/1")
    drawn(page, 4)
    figure = page.locator("figure.plot").first
    before = int(figure.get_attribute("data-points") or 0)
    file = max((ground / "runs" / "second" / "metrics").glob("*.jsonl"))
    last = orjson.loads(file.read_bytes().splitlines()[-1])
    longer = file.with_suffix(".new")
    longer.write_bytes(file.read_bytes() + orjson.dumps(last | {"step": last["step"] + 1, "loss": 1.0}) + b"\n")
    longer.replace(file)
    expect(figure).to_have_attribute("data-points", str(before + 1), timeout=10_000)


def test_a_run_that_was_killed_and_went_wrong_shows_that(browser: Browser, ground: Path, tmp_path: Path) -> None:
    """Steps 16 to 24 come twice, and the loss of step 21 was no number: the trainer leaves such numbers out."""
    shutil.copytree(ground / "runs" / "first", tmp_path / "resumed")
    (file,) = (tmp_path / "resumed" / "metrics").iterdir()
    records = [orjson.loads(line) for line in file.read_bytes().splitlines()]
    file.unlink()
    again = [dict(record) for record in records[15:]]
    del again[5]["loss"]
    for record in records:
        record["loss"] += 0.02 * max(0, record["step"] - 12)
    for first, number, some in ((1, 1, records[:24]), (16, 2, again)):
        lines = b"".join(orjson.dumps(record) + b"\n" for record in some)
        file.with_name(f"{first:010d}-{number:06d}-abc.jsonl").write_bytes(lines)
    with served(tmp_path) as address, browser.new_context(viewport=WIDE) as context:
        page = context.new_page()
        page.goto(address)
        page.goto(f"{base(page)}/runs")
        drawn(page, 1)
        figure = page.locator("figure.plot")
        expect(figure).to_have_attribute("data-points", "30")
        expect(figure.locator("figcaption")).to_contain_text("not finite at 1 step (marked above)")
        expect(figure.locator("figcaption")).to_contain_text("before a later session took them again")
        expect(figure.locator(".u-legend")).to_contain_text("before it was taken again")
        shot(page, "ui-resumed")


def test_a_search_finds_a_document_whose_tokens_are_coloured(page: Page) -> None:
    page.goto(f"{base(page)}/datasets/0/documents")
    page.get_by_label("Search").fill("def dumps(")
    page.get_by_label("in the text").check()
    page.get_by_role("button", name="Search").click()
    hit = page.get_by_role("link", name="json/__init__.py")
    expect(hit).to_be_visible(timeout=20_000)
    expect(page.locator("#progress")).to_contain_text("looked at", timeout=20_000)
    shot(page, "ui-search")
    hit.click()
    spans = page.locator(".tokens span")
    assert spans.count() > 500
    colours = {spans.nth(place).evaluate("each => getComputedStyle(each).backgroundColor") for place in range(4)}
    assert len(colours) == 4
    shot(page, "ui-document")


def test_keys_are_enough(page: Page) -> None:
    page.goto(f"{base(page)}/datasets/0/documents/0/0")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/documents/0/1?version=*")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/documents/0/0?version=*")
    page.goto(f"{base(page)}/datasets/0/documents")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("logging/")
    page.keyboard.press("Enter")
    expect(page.locator("#hits tbody tr").first).to_contain_text("logging/")
    page.goto(f"{base(page)}/")
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.tagName"))
    assert {"#main", "/datasets/0", "/runs", "/runs/0", "/runs/1"} <= seen


def test_dark_is_dark_and_light_is_light(page: Page) -> None:
    shade = page.evaluate("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (shade < 60) == page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_by_a_signal_and_leaves_nothing(ground: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "datastore", "ui", str(ground / "data"), "--no-open"]
    # What starts tests in the background may have them ignore Ctrl-C, and so whatever they start.
    program = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
    server = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.replace("token=", "token=wrong-"), timeout=20)
        server.send_signal(sent)
        _, said = server.communicate(timeout=20)
        assert said == ""
        assert server.returncode in {0, -sent}
    finally:
        server.kill()
        server.wait()

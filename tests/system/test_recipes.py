"""Each recipe trains as it stands, on data made of the standard library, and what it has learned is proven."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from datastore.config import load_settings
from datastore.training.export import report as reports
from datastore.training.export.inference import evaluate
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder, is_run
from datastore.training.run.proof import prove
from datastore.training.settings import Settings
from datastore.training.start import train

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
INIT = {"continue": "pretrain", "chat": "pretrain", "preference": "chat"}
"""What begins with the weights of another one."""

UNITS = {"classes": "texts", "clicks": "records", "next_item": "items", "preference": "pairs"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(RECIPES, folder / "recipes")
    subprocess.run([sys.executable, "recipes/make_data.py"], cwd=folder, check=True, timeout=200, env={**os.environ})
    return folder


def run_of(name: str) -> str:
    """Train a recipe, if that was not done yet."""
    run = f"runs/{name}"
    if not is_run(RunFolder.open(run).storage):
        if name in INIT:
            run_of(INIT[name])
        train(load_settings(Settings, Path("recipes") / f"{name}.toml"), run)
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_learns_and_is_proven(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(place)
    run = run_of(name)
    lines = read_metrics(RunFolder.open(run).storage)
    assert min(float(line["loss"]) for line in lines[-4:]) < float(lines[0]["loss"])
    assert prove(run).holds
    data = "data/sessions" if name == "next_item" else ""  # Of its 44 sessions none is held out.
    monkeypatch.setattr(reports, "_SECONDS", 0.0)
    found, (told,) = evaluate(run, data=data), reports.report([run], data=data)
    assert told.loss == found.loss
    assert found.unit == UNITS.get(name, "tokens")
    assert min(told.tokens_per_s.values()) > 0


def test_every_recipe_is_on_the_page() -> None:
    page = (RECIPES.parent / "howto" / "recipes.md").read_text(encoding="utf-8")
    for path in RECIPES.glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        assert text.partition("[train]")[0].strip() in page, f"{path.name} is not on the page as it is"

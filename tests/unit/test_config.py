"""A TOML file and overrides become one record, or one clear error."""

import re
import string
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.config import load_settings, parse_override, settings_from
from datastore.document import Document
from datastore.errors import ConfigError, MissingError
from datastore.ingestion.settings import IngestSettings
from datastore.training.settings import Settings


class Inner(Document, frozen=True, kw_only=True):
    steps: int = 10
    rate: float = 0.1
    name: str = ""
    on: bool = False
    mode: Literal["fast", "safe"] = "safe"
    both: bool | Literal["auto"] = "auto"


class Outer(Document, frozen=True, kw_only=True):
    train: Inner = Inner()
    sources: tuple[str, ...] = ()


WORDS = st.text(string.ascii_letters, min_size=1, max_size=8).filter(
    lambda word: word not in {"true", "false", "inf", "nan"}
)


def test_a_file_and_overrides_are_one_record(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('sources = ["a"]\n[train]\nsteps = 5\n')
    settings = load_settings(Outer, path, ["train.rate=1e-3", "train.name=first", "train.on=true"])
    assert settings == Outer(train=Inner(steps=5, rate=1e-3, name="first", on=True), sources=("a",))


@given(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), WORDS, st.booleans())
def test_an_override_means_what_the_file_would(steps: int, rate: float, name: str, on: bool) -> None:  # noqa: FBT001
    texts = [f"train.steps={steps}", f"train.rate={rate}", f"train.name={name}", f"train.on={str(on).lower()}"]
    table = {"train": {"steps": steps, "rate": rate, "name": name, "on": on}}
    assert settings_from(Outer, {}, overrides=texts, where="x") == settings_from(Outer, table, where="x")


@given(WORDS, WORDS)
def test_of_two_overrides_the_last_wins(first: str, last: str) -> None:
    texts = [f"train.name={first}", f"train.name={last}"]
    assert settings_from(Outer, {}, overrides=texts, where="x").train.name == last


def test_overrides_leave_the_table_they_change_alone() -> None:
    table: dict[str, Any] = {"train": {"steps": 1}}
    settings_from(Outer, table, overrides=["train.steps=2"], where="x")
    assert table == {"train": {"steps": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=3", 3),
        ("k=[1, 2]", [1, 2]),
        ("k=a b", "a b"),
        ("k=", ""),
        ("k=s3://b/x?y=1", "s3://b/x?y=1"),
        ('k="3"', "3"),
    ],
)
def test_the_value_of_an_override_is_toml_or_else_text(text: str, value: object) -> None:
    assert parse_override(text) == (["k"], value)


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", ".a=1", ""])
def test_an_override_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a setting"):
        parse_override(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], r"unknown setting `train.stepz` \(where='--set train.stepz=1'.*Did you mean train.steps\?"),
        (["steps=1"], r"unknown setting `steps` \(where='--set steps=1'.*Did you mean train.steps\?"),
        (["tain.steps=1"], r"unknown setting `tain` \(where='--set tain.steps=1'.*Did you mean train\?"),
        (["zzz=1"], r"unknown setting `zzz` \(where='--set zzz=1', known=\['train', 'sources'\]\)"),
        (["train.steps=many"], r"`train.steps`: expected `int`, got `str` \(where='--set train.steps=many'\)"),
        (["train.steps.more=1", "train.steps=1"], r"expected `int`|not a table \(.*--set train.steps.more=1"),
        (["sources.x=1"], r"not a table \(key='sources', where='--set sources.x=1'\)"),
        (["train=1"], r"`train`: expected `object`, got `int` \(where='--set train=1'\)"),
        (
            ["train.mode=fats"],
            r"`train.mode`: it cannot be 'fats' .*--set train.mode=fats', allowed=\['fast', 'safe'\]",
        ),
        (["train.on=maybe"], r"`train.on`: expected `bool`, got `str` .*allowed=\['true', 'false'\]"),
        (["train.both=1"], r"`train.both`: .*--set train.both=1', allowed=\['true', 'false', 'auto'\]"),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from(Outer, {"sources": [], "train": {"steps": 3}}, overrides=overrides, where="x")


def test_what_the_file_says_wrong_is_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nstepz = 5\n")
    with pytest.raises(ConfigError, match=r"`train.stepz` \(where='.*run.toml'"):
        load_settings(Outer, path, ["train.rate=0.5"])


def test_a_missing_setting_is_named() -> None:
    class Needy(Document, frozen=True, kw_only=True):
        url: str

    with pytest.raises(ConfigError, match=r"the setting `url` is missing \(where='x'\)"):
        settings_from(Needy, {}, where="x")


def test_what_no_single_setting_breaks_is_blamed_on_those_that_were_given() -> None:
    with pytest.raises(ConfigError, match=r"`model`: width / heads must .*where='--set model.heads=7'"):
        settings_from(Settings, {"data": {"url": "x"}}, overrides=["model.heads=7", "train.steps=3"], where="run.toml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere\.toml"):
        load_settings(Outer, tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"[train]\n[train]\n"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a TOML file.*run\.toml"):
        load_settings(Outer, path)


def test_a_folder_in_rank_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_settings(Outer, tmp_path)


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "ingest.toml").write_text('tokenizer = "t"\nchat_day = 2026-01-02\n', encoding="utf-8")
    assert load_settings(IngestSettings, tmp_path / "ingest.toml").chat_day == "2026-01-02"
    found = load_settings(IngestSettings, tmp_path / "ingest.toml", ["chat_day=2026-03-04"])
    assert found.chat_day == "2026-03-04"

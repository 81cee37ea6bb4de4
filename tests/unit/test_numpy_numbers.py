"""A number of NumPy is a number wherever one can be given, and what is stored or told of it is one of Python."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import datastore as ds
from datastore.checkpoint.inspect import inspect_step
from datastore.config import settings_from
from datastore.document import SettingsDocument
from datastore.errors import plain
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.inference import Sampling
from datastore.training.settings import Settings, StageSettings

I = np.int64  # noqa: E741 - it stands before every number here


@pytest.fixture
def data(tmp_path: Path) -> str:
    make_language(tmp_path / "data")
    return str(tmp_path / "data")


@given(
    st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(I), st.floats(allow_nan=False).map(np.float64), st.booleans().map(np.bool_)
    )
)
def test_what_is_made_plain_is_the_same_number(value: Any) -> None:
    found = plain({"a": [value, (value,)], "b": np.asarray(value)})
    assert found == {"a": [value, (value,)], "b": value}
    assert type(found["a"][0]) is type(found["a"][1][0]) is type(found["b"]) in {int, float, bool}


@pytest.mark.parametrize("value", [np.arange(2), np.datetime64("2026-01-01"), "1", None, torch.tensor(1)])
def test_what_is_no_number_stays(value: Any) -> None:
    assert plain(value) is value


def settings_records() -> list[type[SettingsDocument]]:
    """Return every record of settings, hooks' included."""
    import datastore.training.hooks.prune
    import datastore.training.hooks.quantize  # noqa: F401 - they add classes

    return SettingsDocument.__subclasses__()


_NEEDED: dict[str, dict[str, Any]] = {
    "MaskedSettings": {"mask_token": 1},
    "ClassesSettings": {"tokenizer": "tok.json", "labels": ["a", "b"]},
    "NextItemSettings": {"items": 3},
    "ClicksSettings": {"categories": ["a"]},
    "CaptionsSettings": {"tokenizer": "tok.json"},
}
"""What the objectives cannot do without."""


@pytest.mark.parametrize("kind", settings_records(), ids=lambda kind: kind.__qualname__)
def test_settings_hold_plain_numbers(kind: type[SettingsDocument]) -> None:
    needed = {"url": "data"} if "url" in kind.__struct_fields__ else {}
    needed |= {"data": {"url": "data"}} if kind is Settings else {}
    needed |= {"start": 7, "weights": {"a": 1}} if kind is StageSettings else {}
    needed |= _NEEDED.get(kind.__name__, {})
    standard = msgspec.convert(needed, kind)
    numbers = {
        field.name: value
        for field in msgspec.structs.fields(kind)
        if type(value := getattr(standard, field.name)) in {int, float, bool}
    }
    made = kind(**needed | {name: np.asarray(value)[()] for name, value in numbers.items()})
    assert {name: getattr(made, name) for name in numbers} == numbers
    assert all(type(getattr(made, name)) is type(value) for name, value in numbers.items())


def test_a_loader_takes_them_and_its_state_is_json(data: str) -> None:
    dataset = ds.open(data, version=I(1))
    options = ds.LoaderSettings(lanes=I(4), window=I(2))
    loader = ds.Loader(dataset, seq_len=I(8), global_batch=I(4), seed=I(3), rank=ds.Rank(I(1), I(2)), options=options)
    plainly = ds.LoaderSettings(lanes=4, window=2)
    same = ds.Loader(dataset, seq_len=8, global_batch=4, seed=3, rank=ds.Rank(1, 2), options=plainly)
    assert np.array_equal(next(loader).tokens, next(same).tokens)
    assert json.dumps(loader.state_dict()) == json.dumps(same.state_dict())


@pytest.mark.parametrize("value", [8.0, "8", True, np.float32(8)])
def test_what_is_no_whole_number_is_refused_in_words(data: str, value: Any) -> None:
    with pytest.raises(ds.ConfigError, match="seq_len is no whole number"):
        ds.Loader(ds.open(data), seq_len=value, global_batch=4)


def test_records_and_tokens_take_them(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.float64()), ("c", pa.bool_())])
    row = {"a": I(3), "b": np.float32(1.5), "c": np.bool_(True)}
    with ds.record_writer(tmp_path / "records", schema=schema) as records:
        records.write([row, row | {"b": I(2)}])
    assert list(ds.open(tmp_path / "records").iter_records()) == [
        {"a": 3, "b": 1.5, "c": True},
        {"a": 3, "b": 2.0, "c": True},
    ]
    with ds.token_writer(tmp_path / "tokens", vocab_size=I(100)) as tokens:
        tokens.write([I(1), I(2)], id="a")


def test_a_checkpoint_takes_them_as_step_metric_and_state(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(3), "seen": I(3), "rate": np.float32(1.5), "by": {I(7): I(8)}}}
    with ds.Checkpointer(tmp_path / "run", keep=ds.Keep(last=I(2))) as checkpointer:
        checkpointer.save(I(1), state, metrics={"loss": np.float32(1.5), "n": I(3)}, blocking=True)
        back = {"model": {"weight": torch.zeros(3), "seen": 0, "rate": 0.0, "by": {7: 0}}}
        checkpointer.restore(back, step=I(1))
    assert (back["model"]["seen"], back["model"]["rate"], back["model"]["by"]) == (3, 1.5, {7: 8})
    assert inspect_step(open_storage(tmp_path / "run"), 1).summary.metrics == {"loss": 1.5, "n": 3}


def test_operations_and_runs_take_them(data: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c")
    settings = ds.IngestSettings(workers=I(1), task_bytes=I(4096), max_reject_ratio=np.float32(0.5))
    ds.ingest([str(tmp_path / "a.txt")], str(tmp_path / "new"), settings=settings)
    ds.compact(tmp_path / "new", target_bytes=I(2**20))
    ds.expire(tmp_path / "new", keep_last=I(3), older_than_s=np.float64(3))
    ds.vacuum(tmp_path / "new", older_than_s=np.float32(3))
    ds.protect(tmp_path / "new", width=I(2))
    ds.verify(ds.open(data), sample=np.float32(0.5), seed=I(3))
    ds.place(tmp_path / "placed", roots=[str(tmp_path / "second")], copies=I(2))
    found = settings_from(Settings, {"data": {"url": data, "seq_len": I(8), "holdout": np.float32(0.25)}}, where="here")
    assert (found.data.seq_len, found.data.holdout) == (8, 0.25)
    run = tiny_settings(Path(data), "train.steps=2")
    run = msgspec.structs.replace(run, train=msgspec.structs.replace(run.train, steps=I(2), seed=I(1)))
    ds.train(run, str(tmp_path / "run"), processes=I(1))
    ds.generate(str(tmp_path / "run"), "w1", sampling=Sampling(tokens=I(2), temperature=np.float32(0.5)), step=I(2))
    ds.trace(str(tmp_path / "run"), I(2), rank=I(0), limit=I(1))


def test_an_error_shows_and_carries_plain_numbers() -> None:
    error = ds.ConfigError("wrong", count=I(3), ratio=np.float32(1.5), sizes=[I(1)], by={"a": I(2)})
    assert str(error) == "wrong (count=3, ratio=1.5, sizes=[1], by={'a': 2})."
    assert json.loads(json.dumps(error.as_dict()))["values"] == {"count": 3, "ratio": 1.5, "sizes": [1], "by": {"a": 2}}

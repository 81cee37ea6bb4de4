"""Checkpoints of others read into a run and written from one; nothing in them is run."""

import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.exchange.files import import_files, read_files, read_items, write_files
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError
from datastore.storage.resolve import open_storage


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def written(folder: Path, kind: str) -> Path:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "extra": {"n": 3, "lr": [0.1, None]}}
    path = folder / kind
    if kind == "torch.pt":
        torch.save(state, path)
    elif kind == "one.safetensors":
        save_file(dict(model.state_dict()), path)
    elif kind == "hf":
        path.mkdir()
        save_file({"weight": model.weight.data}, path / "model-00001-of-00002.safetensors")
        save_file({"bias": model.bias.data}, path / "model-00002-of-00002.safetensors")
        index = (
            '{"weight_map": {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}}'
        )
        (path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=path)
    return path


@pytest.mark.parametrize("kind", ["torch.pt", "one.safetensors", "hf", "dcp"])
def test_files_of_others_become_a_step_that_restores(tmp_path: Path, kind: str) -> None:
    run = open_storage(str(tmp_path / "run"))
    commit = import_files(written(tmp_path, kind), run, step=7)
    whole = kind in {"torch.pt", "dcp"}
    assert set(commit.items) == ({"model", "optim", "extra"} if whole else {"model"})
    model, optimizer = trained()
    other = torch.nn.Linear(5, 3)
    with Checkpointer(run) as ck:
        extra: dict[str, Any] = {}
        items = {"model": other} | ({"extra": extra} if whole else {})
        assert ck.restore(items, partial=True).step == 7
        if kind == "torch.pt":
            again = torch.optim.AdamW(other.parameters())
            ck.restore({"optim": again}, partial=True)
            assert torch.equal(again.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
    assert extra == ({"n": 3, "lr": [0.1, None]} if whole else {})


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_a_step_is_written_for_others_to_read(tmp_path: Path, kind: Any) -> None:
    model, optimizer = trained()
    run = open_storage(str(tmp_path / "run"))
    with Checkpointer(run) as ck:
        ck.save(1, {"model": model, "optim": optimizer, "extra": {"n": (1, 2.5)}}, blocking=True)
    items = read_items(run, 1)
    to = tmp_path / f"out.{kind}"
    write_files(items, to, format=kind)
    found = torch.load(to, weights_only=True) if kind == "torch" else read_files(to)
    assert torch.equal(found["model"]["weight"], model.weight)
    assert found["extra"] == {"n": (1, 2.5)}
    write_files(items["model"], tmp_path / "out.safetensors", format="safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["bias"], model.bias)
    with pytest.raises(ConfigError, match="exists already"):
        write_files(items, to, format=kind)
    with pytest.raises(ConfigError, match="holds tensors alone"):
        write_files(items, tmp_path / "all.safetensors", format="safetensors")
    assert not (tmp_path / "all.safetensors").exists()


class Harmless:
    """Its pickle would call a function that only notes that it was called."""

    called = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _note, ()


def _note() -> int:
    Harmless.called = True
    return 1


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "x": Harmless()}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="no tensor and no plain value"):
        read_files(tmp_path / "x.pt")
    for folder, part in (("contents", ".metadata"), ("leaf", "")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"m": {"w": torch.ones(2)}, "x": 1 if part else Harmless()}, checkpoint_id=tmp_path / folder)
        if part:
            (tmp_path / folder / part).write_bytes(pickle.dumps(Harmless()))
        with pytest.raises(FormatError):
            read_files(tmp_path / folder)
    assert not Harmless.called
    assert sys.modules[__name__]


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 100) + b"{")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    torch.save(OrderedDict(a=OrderedDict(w=torch.ones(1))), tmp_path / "ordered.pt")
    cases: list[tuple[str, type[Exception]]] = [
        ("empty", FormatError),
        ("cut.safetensors", CorruptError),
        ("tensor.pt", FormatError),
        ("nothing", MissingError),
    ]
    for name, error in cases:
        with pytest.raises(error, match=name):
            read_files(tmp_path / name)
    with pytest.raises((FormatError, CorruptError)):
        read_files(tmp_path / "junk.pt")
    assert type(read_files(tmp_path / "ordered.pt")["a"]) is dict


class Options:
    """No library lets torch load it, as some do for `argparse.Namespace` when they are imported."""


def test_what_torch_opens_in_no_way_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="utf-8")
    (tmp_path / "program.pt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    torch.save({"options": Options()}, tmp_path / "options.pt")
    with Checkpointer(tmp_path / "run") as ck:
        for step in (1, 2):
            ck.save(step, {"model": {"w": torch.full((3,), step)}}, blocking=True)
    for name, told in (
        ("text", "not a checkpoint that is known here"),
        ("program.pt", "TorchScript"),
        ("options.pt", rf"no plain value: {__name__}.Options"),
        ("run", "datastore checkpoint fork"),
        ("run/parts", "the same key"),
    ):
        with pytest.raises(FormatError, match=told):
            read_files(tmp_path / name)

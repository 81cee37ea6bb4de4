"""Folders that Orbax 0.12.8 wrote, kept as they were: what is in them becomes a step, and what cannot is named."""

import zipfile
from pathlib import Path

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.exchange.files import import_files, read_files
from datastore.errors import CorruptError, FormatError
from datastore.storage.resolve import open_storage

pytest.importorskip("tensorstore")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax")
    with zipfile.ZipFile(Path(__file__).with_name("orbax-0.12.8.zip")) as archive:
        archive.extractall(folder)
    return folder


W = torch.arange(12.0).view(3, 4)

B = (torch.arange(4).to(torch.bfloat16) / 3).to(torch.bfloat16)


def test_a_tree_of_arrays_and_numbers_is_read(made: Path) -> None:
    found = read_files(made / "standard")
    assert found.keys() == {"params", "opt", "step", "lr", "counts", "none", "empty", "scalar"}
    params = found["params"]
    assert torch.equal(params["w"], W)
    assert params["w"].dtype == torch.float32
    assert torch.equal(params["b"], B)
    assert [layer.dtype for layer in params["layers"]] == [torch.float32, torch.int8]
    assert params["f8"].dtype == torch.float8_e4m3fn
    assert params["f8"].float().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found["opt"][1]["nu"], torch.full((2, 2), 0.5))
    assert (found["step"], found["lr"], found["none"], found["empty"]) == (7, pytest.approx(0.001), None, {})
    assert found["counts"].dtype == torch.uint16
    assert found["scalar"].item() == 2.5


@pytest.mark.parametrize("kind", ["folders", "zarr3"])
def test_the_other_ways_to_store_arrays_are_read(made: Path, kind: str) -> None:
    found = read_files(made / kind)
    assert torch.equal(found["w"], W)
    assert torch.equal(found["b"], B)
    assert found["step"] == 7


def test_a_step_of_several_items_is_a_map_of_them(made: Path) -> None:
    found = read_files(made / "run" / "3")
    assert torch.equal(found["state"]["w"], W)
    assert found["extra"] == {"x": 1, "name": "y"}


def test_it_becomes_a_step(made: Path, tmp_path: Path) -> None:
    import_files(made / "run" / "3", open_storage(tmp_path), step=3)
    target = {"w": torch.zeros(3, 4)}
    with Checkpointer(tmp_path) as ck:
        assert ck.restore({"state": target}, partial=True).step == 3
    assert torch.equal(target["w"], W)


def test_what_cannot_be_read_is_named(made: Path) -> None:
    with pytest.raises(FormatError, match="name='name', kind='string'"):
        read_files(made / "texts")
    with pytest.raises(FormatError, match=r"one place, and only one is there \(name='a.b'"):
        read_files(made / "dots")


def test_damage_is_told(made: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with zipfile.ZipFile(Path(__file__).with_name("orbax-0.12.8.zip")) as archive:
        archive.extractall(tmp_path)
    for file in (tmp_path / "standard").rglob("d/*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 255
        file.write_bytes(bytes(raw))
    with pytest.raises(CorruptError):
        read_files(tmp_path / "standard")
    assert read_files(made / "folders")

"""Folders of images and sounds come in through `datasets`, with their bytes; a table that only names files is refused."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import datastore as ds
from datastore.errors import ConfigError
from datastore.media import decode_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures in folders that are their classes, with captions beside them."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for number in range(6):
        kind = folder / ("cat" if number % 2 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 9, 3), dtype=np.uint8)).save(kind / f"{number}.png")
    return folder


def loaded(folder: Path, cache: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))


@pytest.mark.parametrize("form", ["decoded", "raw", "stream", "listed"])
def test_a_folder_of_images_comes_in_with_its_bytes_and_labels(pictures: Path, tmp_path: Path, form: str) -> None:
    found = loaded(pictures, tmp_path / "cache")
    if form == "raw":
        found = found.cast_column("image", datasets.Image(decode=False))
    if form == "stream":
        found = found.to_iterable_dataset()
    if form == "listed":
        paths = sorted(map(str, pictures.glob("*/*.png")))
        features = datasets.Features({"image": datasets.List(datasets.Image())})
        found = datasets.Dataset.from_dict({"image": [paths[:2], paths[2:]]}, features=features)
    ds.ingest(found, tmp_path / "set")
    table = ds.open(tmp_path / "set").to_arrow()
    values = table.column("image").to_pylist()
    if form == "listed":
        values = [value for row in values for value in row]
    else:
        assert sorted(table.column("label").to_pylist()) == [0, 0, 0, 1, 1, 1]
    assert {value["bytes"] for value in values} == {path.read_bytes() for path in pictures.glob("*/*.png")}
    assert decode_image(values[0]).shape == (8, 9, 3)


def test_a_picture_that_is_gone_is_named(pictures: Path, tmp_path: Path) -> None:
    found = loaded(pictures, tmp_path / "cache")
    (pictures / "cat" / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"1\.png"):
        ds.ingest(found, tmp_path / "set")


def test_a_table_that_only_names_its_pictures_is_refused_and_null_is_fine(pictures: Path, tmp_path: Path) -> None:
    table = loaded(pictures, tmp_path / "cache").with_format("arrow")[:]
    pq.write_table(table, tmp_path / "names.parquet")
    with pytest.raises(ConfigError, match="only its path"):
        ds.ingest(tmp_path / "names.parquet", tmp_path / "set")
    rows = [
        {"image": None, "n": 1},
        {"image": {"bytes": b"x", "path": "x"}, "n": 2},
        {"image": {"bytes": None, "path": None}, "n": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    ds.ingest(tmp_path / "some.parquet", tmp_path / "other")
    assert ds.open(tmp_path / "other").to_arrow().num_rows == 3

"""What a teacher expects after each token, beside the token."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

import datastore as ds
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export import teaching
from datastore.training.export.export import open_model
from datastore.training.start import train


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teach")
    make_language(folder / "data", shards=3, documents=12)
    train(tiny_settings(folder / "data", "train.steps=4", "checkpoint.every=4"), str(folder / "run"))
    return folder


def stored(url: Path) -> Any:
    return ds.open(url).to_arrow(tokens=True)


def test_the_columns_are_what_the_model_says_directly(ground: Path, tmp_path: Path) -> None:
    report = ds.teach(str(ground / "data"), str(tmp_path / "taught"), model=str(ground / "run"), top=5)
    assert (report.added, report.shards, report.documents) == (True, 3, 36)
    loaded = open_model(str(ground / "run"))
    dataset = ds.open(tmp_path / "taught")
    table = teaching.read_token_table(dataset.storage, dataset.segments.shard(1))
    first, last = int(table.offsets[2]), int(table.offsets[3])
    length = loaded.seq_len
    with torch.inference_mode():
        for at in (first, first + 3, first + length - 1, first + length, last - 1):
            # The document from its beginning; behind the first window, from half a window before the last one that begins.
            begin = (
                first
                if at < first + length
                else first + (1 + (at - first - length) // (length - length // 2)) * (length - length // 2)
            )
            logits = loaded.model(torch.from_numpy(table.values[begin : at + 1].astype(np.int64))[None])[0, -1]
            scores, tokens = logits.float().log_softmax(-1).topk(5)
            assert table.columns["teacher_tokens"][at].tolist() == tokens.tolist()
            np.testing.assert_allclose(table.columns["teacher_logprobs"][at], scores.numpy(), rtol=2e-3)


def test_documents_and_tokens_are_those_of_the_source(ground: Path, tmp_path: Path) -> None:
    ds.teach(str(ground / "data"), str(tmp_path / "taught"), model=str(ground / "run"))
    one, other = stored(ground / "data"), stored(tmp_path / "taught")
    assert one.column("id") == other.column("id")
    assert one.column("tokens") == other.column("tokens")


def test_the_loader_reads_them(ground: Path, tmp_path: Path) -> None:
    ds.teach(str(ground / "data"), str(tmp_path / "taught"), model=str(ground / "run"), top=3)
    options = ds.LoaderSettings(columns=("teacher_tokens", "teacher_logprobs"))
    batch = next(ds.Loader(ds.open(tmp_path / "taught"), seq_len=16, global_batch=4, options=options))
    assert batch.columns["teacher_tokens"].shape == (4, 17, 3)
    assert (np.diff(batch.columns["teacher_logprobs"].astype(np.float32)) <= 0).all()


def test_one_that_was_cut_off_goes_on_and_gives_the_same_bytes(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds.teach(str(ground / "data"), str(tmp_path / "whole"), model=str(ground / "run"))
    real, calls = teaching._do, []

    def once(*arguments: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(teaching, "_do", once)
    with pytest.raises(KeyboardInterrupt):
        ds.teach(str(ground / "data"), str(tmp_path / "cut"), model=str(ground / "run"))
    monkeypatch.setattr(teaching, "_do", real)
    report = ds.teach(str(ground / "data"), str(tmp_path / "cut"), model=str(ground / "run"))
    assert (report.shards, report.shards_resumed) == (3, 1)
    assert not ds.teach(str(ground / "data"), str(tmp_path / "cut"), model=str(ground / "run")).added
    one, other = ds.open(tmp_path / "whole"), ds.open(tmp_path / "cut")
    assert [one.segments.shard(i) for i in range(3)] == [other.segments.shard(i) for i in range(3)]
    assert other.version == 1


def test_deleted_documents_stay_behind(ground: Path, tmp_path: Path) -> None:
    make_language(tmp_path / "data", shards=1, documents=12)
    gone = stored(tmp_path / "data").column("id").to_pylist()[3]
    ds.delete(str(tmp_path / "data"), where=pc.field("id") == gone)
    report = ds.teach(str(tmp_path / "data"), str(tmp_path / "taught"), model=str(ground / "run"))
    assert report.documents == 11
    assert gone not in stored(tmp_path / "taught").column("id").to_pylist()
    assert not ds.verify(ds.open(tmp_path / "taught")).bad


def test_what_does_not_go_together_is_refused_before_the_work(ground: Path, tmp_path: Path) -> None:
    with pytest.raises(ds.ConfigError, match="so many tokens cannot be kept"):
        ds.teach(str(ground / "data"), str(tmp_path / "taught"), model=str(ground / "run"), top=0)
    ds.teach(str(ground / "data"), str(tmp_path / "taught"), model=str(ground / "run"), top=2)
    make_language(tmp_path / "more", shards=1, documents=3, seed=5)
    with pytest.raises(ds.ConfigError, match="has not the same columns"):
        ds.teach(str(tmp_path / "more"), str(tmp_path / "taught"), model=str(ground / "run"), top=3)

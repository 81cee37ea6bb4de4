"""What people see at a glance: histograms in a line, tables in notebooks."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typing_extensions import override

import datastore as ds
from datastore.display import html_fields, html_table, sparkline


class Cells(HTMLParser):
    """The texts of a table, and whether all of its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    @override
    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def cells(text: str) -> list[str]:
    return Cells(text).texts


def test_what_looks_like_a_tag_is_text() -> None:
    assert cells(html_fields("<b>", {"<i>": "<script>", "none": None})) == ["<b>", "<i>", "<script>"]
    assert cells(html_table("t", ["a"], [["<td>"], [1234]])) == ["t", "a", "<td>", "1,234"]


def test_every_bar_that_is_not_nothing_is_seen() -> None:
    assert sparkline([0, 1, 10**9]) == "▁▂█"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"


@pytest.fixture
def tokens(tmp_path: Path) -> ds.Dataset:
    for task, lengths in enumerate([(1, 2, 3), (4, 7), (8, 1, 100)]):
        with ds.token_writer(tmp_path / "tokens", vocab_size=10, task_id=str(task)) as writer:
            for number, length in enumerate(lengths):
                writer.write(np.ones(length, dtype=np.uint16), id=f"{task}-{number}")
    return ds.open(tmp_path / "tokens")


def test_lengths_are_counted_by_their_bits_without_what_is_deleted(tokens: ds.Dataset) -> None:
    assert len(tokens.segments) == 3
    assert tokens.lengths() == [0, 2, 2, 2, 1, 0, 0, 1]
    assert sum(tokens.lengths(most_shards=1)) == tokens.segments.shard(0).documents
    ds.delete(tokens.url, where="tokens = 100")
    assert ds.open(tokens.url).lengths() == [0, 2, 2, 2, 1]


def test_lengths_of_records_are_refused(tmp_path: Path) -> None:
    ds.ingest([{"text": "one"}], tmp_path / "rows")
    with pytest.raises(ds.ConfigError, match="records have no tokens"):
        ds.open(tmp_path / "rows").lengths()


def test_a_notebook_shows_what_a_dataset_holds(tokens: ds.Dataset, tmp_path: Path) -> None:
    shown = cells(tokens._repr_html_())
    assert shown[0].startswith(f"{tokens.url}, version 3 (")
    assert dict(zip(shown[1::2], shown[2::2], strict=True))["tokens"] == "126"
    ds.ingest([{"text": "one", "n": 1}], tmp_path / "rows")
    assert "text: string" in cells(ds.open(tmp_path / "rows")._repr_html_())[4]


def test_a_notebook_shows_where_a_loader_stands(tokens: ds.Dataset, tmp_path: Path) -> None:
    with ds.Loader(tokens, seq_len=4, global_batch=4, rank=ds.Rank(1, 2)) as loader:
        next(loader)
        shown = cells(loader._repr_html_())
    facts = dict(zip(shown[1::2], shown[2::2], strict=True))
    assert facts["batch"] == "2 of 4 samples, as rank 1 of 2"
    assert facts["stands at"] == "sample 4 of pass 1"
    assert facts["data"] == f"Dataset('{tokens.url}', version=3)"
    ds.ingest([{"text": "one"}, {"text": "two"}], tmp_path / "rows")
    rows = ds.RowLoader(ds.open(tmp_path / "rows"), global_batch=1)
    next(rows)
    next(rows)
    assert "sample 0 of pass 2" in cells(rows._repr_html_())


def test_a_notebook_shows_the_newest_steps(tmp_path: Path) -> None:
    with ds.Checkpointer(tmp_path / "run", keep=ds.Keep(last=50)) as checkpoints:
        assert cells(checkpoints._repr_html_())[0] == f"{tmp_path / 'run'}: 0 steps"
        for step in range(25):
            checkpoints.save(step, {"model": {"w": torch.ones(256)}}, metrics={"loss": 2.5}).committed()
        shown = cells(checkpoints._repr_html_())
    assert shown[0] == f"{tmp_path / 'run'}: 25 steps"
    assert [text for text in shown if text.isdecimal()][:1] == ["24"]
    assert shown.count("loss 2.5") == 20
    assert shown.count("1 KiB") >= 20

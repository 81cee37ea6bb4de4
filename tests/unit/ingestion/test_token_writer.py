"""Tokens from a program of one's own: what goes with each of them, all or nothing, and the same again without harm."""

from pathlib import Path

import numpy as np
import pytest

import datastore as ds
from datastore.dataset.durability.verify import verify
from datastore.dataset.shards.files import read_token_table
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, ConflictError, MissingError, StorageError
from datastore.ingestion.writers.tokens import TokenWriter, token_writer
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset, make_language

COLUMNS = {"loss_mask": "bool", "logits": ("float16", 3), "weight": "float32"}


def document(number: int) -> dict[str, object]:
    generator = np.random.default_rng(number)
    length = number % 7
    return {
        "tokens": generator.integers(0, 50, length).tolist(),
        "id": f"document {number}",
        "source": f"part {number % 2}",
        "loss_mask": generator.integers(0, 2, length).tolist(),
        "logits": generator.normal(size=(length, 3)).astype(np.float16),
        "weight": generator.random(length, np.float32),
    }


def write(out: TokenWriter, numbers: range) -> None:
    for number in numbers:
        out.write(**document(number))  # type: ignore[arg-type]


def test_what_is_written_is_read_document_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.ingestion.writers.tokens._SHARD_BYTES", 200)
    with token_writer(tmp_path, vocab_size=50, columns=COLUMNS) as out:
        write(out, range(40))
    dataset = open_dataset(tmp_path)
    assert out.commit == dataset.commit
    assert len(dataset.segments) > 3
    assert verify(dataset).ok
    number = 0
    for index, shard in enumerate(dataset.segments):
        table = read_token_table(dataset.storage, shard)
        for row, entry in enumerate(dataset.documents(index).to_pylist()):
            wanted, part = document(number), slice(table.offsets[row], table.offsets[row + 1])
            assert (entry["id"], entry["source"]) == (wanted["id"], wanted["source"])
            assert table.values[part].tolist() == wanted["tokens"]
            assert table.columns["loss_mask"][part].tolist() == wanted["loss_mask"]
            assert np.array_equal(table.columns["logits"][part], wanted["logits"].astype(np.float16))
            assert np.array_equal(table.columns["weight"][part], wanted["weight"].astype(np.float32))
            number += 1
    assert number == 40


def test_the_datasets_tokenizer_says_which_tokens_there_may_be(tmp_path: Path) -> None:
    before = make_language(tmp_path / "one")
    with token_writer(tmp_path / "one") as out:
        out.write([1, 2, 60], id="a")
        with pytest.raises(ConfigError, match=r"outside of the vocabulary \(id='b', smallest=0, largest=61"):
            out.write([0, 61], id="b")
    after = open_dataset(tmp_path / "one")
    assert after.commit.tokenizer == before.commit.tokenizer
    assert after.totals.documents == before.totals.documents + 1
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(before.tokenizer() or b"")
    with pytest.raises(ConfigError, match="the tokenizer has no such end-of-text token"):
        token_writer(tmp_path / "two", tokenizer=tokenizer)
    with token_writer(tmp_path / "two", tokenizer=tokenizer, end_of_text="<end>") as out:
        out.write([60], id="a")
    assert open_dataset(tmp_path / "two").commit.tokenizer == before.commit.tokenizer
    with pytest.raises(ConfigError, match="the dataset holds tokens of a tokenizer that it does not name"):
        token_writer(make_dataset(tmp_path / "three", [[4]]).url, tokenizer=tokenizer, end_of_text="<end>")


def write_and_fail(out: TokenWriter) -> None:
    """Write one shard, and then what cannot be written."""
    with out:
        out.write(range(30), id="a")
        out._store_shard()
        out.write([-1], id="b")


def test_a_block_that_raises_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.ingestion.writers.tokens._SHARD_BYTES", 20)
    make_dataset(tmp_path, [[5]])
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match="outside of the vocabulary"):
        write_and_fail(token_writer(tmp_path, vocab_size=2**16))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_the_same_task_again_adds_nothing_and_other_documents_under_its_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.ingestion.writers.tokens._SHARD_BYTES", 100)

    def again(numbers: range, task_id: str = "task") -> None:
        with token_writer(tmp_path, vocab_size=50, columns=COLUMNS, task_id=task_id) as out:
            write(out, numbers)

    again(range(20))
    first = open_dataset(tmp_path)
    again(range(20))
    assert open_dataset(tmp_path).commit == first.commit
    with pytest.raises(ConflictError, match="other documents were written under this task id"):
        again(range(1, 21))
    assert verify(open_dataset(tmp_path)).ok
    again(range(20), "other")
    assert open_dataset(tmp_path).totals.documents == 40


def test_a_task_that_was_killed_does_not_take_what_another_run_of_it_committed(tmp_path: Path) -> None:
    with token_writer(tmp_path, vocab_size=50, task_id="task") as out:
        out.write(range(30), id="a")
    with pytest.raises(ConfigError, match="outside of the vocabulary"):
        write_and_fail(token_writer(tmp_path, vocab_size=50, task_id="task"))
    assert verify(open_dataset(tmp_path)).ok


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"loss_mask": [1, 0]}, "does not fit what was declared"),
        ({"loss_mask": [1, 0, 2]}, "does not fit what was declared"),
        ({"loss_mask": [1, 0, -1]}, "does not fit what was declared"),
        ({"logits": [1.0, 2.0, 3.0]}, "does not fit what was declared"),
        (
            {"other": [1, 2, 3]},
            r"other columns than were declared .*given=\['logits', 'loss_mask', 'other', 'weight'\]",
        ),
        ({"tokens": [[1, 2, 3]]}, "flat list of integers"),
        ({"tokens": [0.5, 1.0, 2.0]}, "flat list of integers"),
        ({"tokens": [1, 2, -1]}, "outside of the vocabulary"),
    ],
)
def test_a_document_that_does_not_fit_is_refused_and_the_others_stay(
    tmp_path: Path, change: dict[str, object], fact: str
) -> None:
    with token_writer(tmp_path, vocab_size=50, columns=COLUMNS) as out:
        write(out, range(3, 4))
        with pytest.raises(ConfigError, match=fact):
            out.write(**(document(3) | change))  # type: ignore[arg-type]
        write(out, range(4, 5))
    assert open_dataset(tmp_path).totals.documents == 2


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({"id": "uint8"}, "not a name for a column"),
        ({"w": "complex64"}, "not a type for a column"),
        ({"loss_mask": "float32"}, "a loss mask has one bool for each token"),
    ],
)
def test_a_column_that_cannot_be_stored_is_refused_at_once(tmp_path: Path, columns: dict[str, str], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        token_writer(tmp_path, vocab_size=50, columns=columns)


def test_all_tokens_of_a_dataset_have_the_same_columns(tmp_path: Path) -> None:
    with token_writer(tmp_path, vocab_size=50, columns={"loss_mask": "bool"}) as out:
        out.write([1, 2], id="a", loss_mask=[0, 1])
    with pytest.raises(ConfigError, match=r"other columns beside them .*Declare the same columns, or name another URL"):
        token_writer(tmp_path, vocab_size=50)
    with pytest.raises(ConfigError, match=r"other columns beside them than the dataset's .*dataset=\['loss_mask'\]"):
        make_dataset(open_storage(tmp_path), [[4]])


def test_who_does_not_say_how_large_the_vocabulary_is_or_writes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody says how large the vocabulary is"):
        token_writer(tmp_path)
    with pytest.raises(ConfigError, match="nothing was written"), token_writer(tmp_path, vocab_size=2):
        pass


def test_a_full_disk_is_reported_and_nothing_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space left")

    out = token_writer(tmp_path, vocab_size=9)
    monkeypatch.setattr(type(out.storage), "put", full)
    with pytest.raises(StorageError, match="no space left"), out:
        out.write([1], id="a")
    monkeypatch.undo()
    with pytest.raises(MissingError):
        open_dataset(tmp_path)


def test_the_package_has_it() -> None:
    assert ds.token_writer is token_writer

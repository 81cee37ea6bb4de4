"""From a sample back to its documents, their sources, and the very bytes."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from datastore.dataset.log.keys import tokenizer_key
from datastore.dataset.log.manifest import TokenizerRef
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import shard_uid, write_token_shard
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_bytes, sha256_hex
from datastore.errors import ConfigError, ResumeError
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokentext import TokenText
from datastore.loader.loader import Loader
from datastore.loader.settings import Rank
from datastore.loader.trace import DocumentSpan, Tracer, locate, plan_step
from datastore.storage.backends.local import LocalStorage
from datastore.testing.examples import make_dataset

TEXTS = [
    ["def f(x):\n    return x\n", "", "größer als — 数据 🙂\n"],
    ["x = 1\n" * 40],
    ["import os\n\nprint(os.sep)\n", "naïve café\n"],
]


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for texts in TEXTS for text in texts], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    """Each text is a file of its own, all but the first half of shard 2, whose documents lie in one file."""
    storage = LocalStorage(tmp_path / "data")
    raw = tokenizer.to_str().encode()
    ref = TokenizerRef(sha256=sha256_hex(raw), vocab_size=300, end_of_text=tokenizer.token_to_id("<|end|>"))
    storage.put(tokenizer_key(ref.sha256), raw)
    shards = []
    for number, texts in enumerate(TEXTS):
        ids = [[*tokenizer.encode(text).ids, ref.end_of_text] for text in texts]
        lengths = [len(document) for document in ids]
        sizes = [len(text.encode()) for text in texts]
        rows = {
            "id": [f"{number}-{row}" for row in range(len(texts))],
            "source": [f"source-{number}.txt"] * len(texts),
            "offset": np.cumsum([0, *sizes[:-1]]),
            "length": sizes,
            "tokens": lengths,
            "digest": pa.array([digest_bytes(text.encode()) for text in texts], pa.binary(16)),
        }
        (tmp_path / f"source-{number}.txt").write_text("".join(texts), encoding="utf-8")
        values = np.concatenate([np.array(document, np.uint16) for document in ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        table = pa.table(rows, schema=DOCUMENTS_SCHEMA)
        shards.append(
            write_token_shard(storage, uid=shard_uid("trace", number), values=values, offsets=offsets, documents=table)
        )
    commit_shards(storage, shards, tokenizer=ref)
    return open_dataset(storage)


@pytest.mark.parametrize("seq_len", [1, 5, 16, 60])
def test_the_spans_of_a_sample_are_its_tokens_without_a_gap(dataset: Dataset, seq_len: int) -> None:
    shards = [dataset.token_shard(shard)[0] for shard in range(3)]
    whole = np.concatenate(shards)
    samples = range((len(whole) - 1) // seq_len)
    for origin in locate(dataset, seq_len=seq_len, samples=samples):
        found = [shards[span.shard][span.shard_tokens[0] : span.shard_tokens[1]] for span in origin.spans]
        start = origin.sample * seq_len
        assert np.array_equal(np.concatenate(found), whole[start : start + seq_len + 1])
        ends = [0, *(span.sample_tokens[1] for span in origin.spans)]
        assert [span.sample_tokens[0] for span in origin.spans] == ends[:-1]
        assert ends[-1] == seq_len + 1


@pytest.mark.parametrize("seq_len", [1, 5, 16, 60])
def test_offset_and_text_range_point_at_the_very_bytes_in_the_source(
    dataset: Dataset, tmp_path: Path, seq_len: int
) -> None:
    tracer = Tracer(dataset, seq_len=seq_len)
    sources: dict[str, list[tuple[int, int]]] = {}
    for origin in tracer.locate(range(sum(dataset.segments.tokens.tolist()) // seq_len - 1)):
        for span in origin.spans:
            around = tracer.text_range(span)
            assert around is not None
            start, stop = span.offset + around[0], span.offset + around[1]
            raw = (tmp_path / span.source).read_bytes()
            assert raw[start:stop].decode("utf-8", "replace") == tracer.text(span)
            assert span.offset <= start <= stop <= span.offset + span.length
            sources.setdefault(span.source, []).append((start, stop))
    for ranges in sources.values():
        assert all(before[1] >= after[0] for before, after in pairwise(ranges))


def test_samples_come_back_in_the_order_asked_for(dataset: Dataset) -> None:
    assert [origin.sample for origin in locate(dataset, seq_len=4, samples=[9, 2, 9])] == [9, 2, 9]


@pytest.mark.parametrize("sample", [-1, 10**6])
def test_a_sample_that_does_not_exist_is_refused(dataset: Dataset, sample: int) -> None:
    with pytest.raises(ConfigError, match=rf"no such sample \(sample={sample}, samples="):
        locate(dataset, seq_len=4, samples=[sample])


def test_a_batch_names_its_documents_row_by_row(dataset: Dataset) -> None:
    batch = next(Loader(dataset, seq_len=4, global_batch=6))
    spans: list[DocumentSpan] = batch.documents()
    wanted = locate(dataset, seq_len=4, samples=batch.samples.tolist())
    assert spans == [span for origin in wanted for span in origin.spans]


def test_a_step_is_planned_again_from_its_state(dataset: Dataset) -> None:
    loader = Loader(dataset, seq_len=4, global_batch=6, seed=9, rank=Rank(1, 2))
    whole = Loader(dataset, seq_len=4, global_batch=6, seed=9)
    for _ in range(3):
        state = loader.state_dict()
        batch, everything = next(loader), next(whole)
        planned = plan_step(dataset, state, global_batch=6, rank=Rank(1, 2))
        assert np.array_equal(planned.samples, batch.samples)
        assert np.array_equal(plan_step(dataset, state, global_batch=6).samples, everything.samples)


def test_a_step_of_another_dataset_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", [[300]])
    state = Loader(other, seq_len=4, global_batch=6).state_dict()
    with pytest.raises(ResumeError, match="dataset, fingerprint differ"):
        plan_step(dataset, state, global_batch=6)


def test_without_a_tokenizer_there_are_spans_but_no_text(tmp_path: Path) -> None:
    tracer = Tracer(make_dataset(tmp_path / "plain", [[30, 0, 40]]), seq_len=8)
    (origin,) = tracer.locate([3])
    assert [(span.document.partition("-")[2], span.document_tokens) for span in origin.spans] == [
        ("0", (24, 30)),
        ("2", (0, 3)),
    ]
    assert tracer.text_range(origin.spans[0]) is None
    with pytest.raises(ConfigError, match="names no tokenizer"):
        tracer.text(origin.spans[0])


TOKENIZER = byte_level_tokenizer()


@given(st.text())
def test_byte_lengths_of_tokens_add_up_to_the_text(text: str) -> None:
    known = TokenText(TOKENIZER.to_str().encode(), end_of_text=0)
    ids = np.array(TOKENIZER.encode(text, add_special_tokens=False).ids, np.uint16)
    if 0 not in ids:
        assert known.exact
        assert known.bytes_in(ids) == len(text.encode())
        assert known.decode(ids) == text


def test_a_tokenizer_that_is_not_byte_level_decodes_but_tells_no_bytes() -> None:
    spaced = Tokenizer.from_str(TOKENIZER.to_str())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    known = TokenText(spaced.to_str().encode(), end_of_text=0)
    assert not known.exact
    ids = np.array([*spaced.encode("def f").ids, 0], np.uint16)
    assert known.decode(ids).strip() == "def f"
    normalized = json.loads(TOKENIZER.to_str()) | {"normalizer": {"type": "Lowercase"}}
    assert not TokenText(json.dumps(normalized).encode(), end_of_text=0).exact

"""What verify reports: each bad file and block by name, and nothing else."""

import uuid
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer, override

from datastore.dataset.durability.blocks import BadBlock, Draw, Room, check_blocks
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.keys import INFO_KEY, commit_key
from datastore.dataset.log.manifest import sum_refs
from datastore.dataset.operations.append import commit_records, commit_shards
from datastore.dataset.shards.deletions import store_deletions
from datastore.dataset.shards.files import put_tokenizer, write_token_shard
from datastore.dataset.shards.inventory import StoredFile
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.document import seal
from datastore.errors import ConfigError, CorruptError, StorageError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset, make_shard


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def dataset(storage: Storage) -> Dataset:
    """One shard of three blocks, the last one short, and a small shard after it."""
    return make_dataset(storage, [[BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 1000], [7]])


def bad(dataset: Dataset) -> list[tuple[str, int | None, str]]:
    return [(found.path, found.block, found.reason) for found in verify(dataset).bad]


def test_a_sound_dataset_is_reported_with_what_was_read(dataset: Dataset) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(dataset, progress=lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.bytes == dataset.totals.size_bytes
    # datastore.json, one commit, one segment, two shards and their documents.
    assert report.files == 7
    assert calls[-1] == (dataset.totals.size_bytes, dataset.totals.size_bytes)
    assert calls == sorted(calls)


def test_each_flipped_block_is_named(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).path
    raw = bytearray(dataset.storage.get(path))
    raw[0] ^= 1
    raw[2 * BLOCK_BYTES] ^= 128
    dataset.storage.put(path, raw)
    assert [(found.path, found.block) for found in verify(dataset).bad] == [(path, 0), (path, 2)]


def test_a_cut_shard_is_named_with_the_blocks_that_are_gone(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).path
    raw = dataset.storage.get(path)
    dataset.storage.put(path, raw[: BLOCK_BYTES + 5])
    found = bad(dataset)
    assert found[0] == (path, None, f"the file has {BLOCK_BYTES + 5} bytes, not {len(raw)}")
    assert [(where, block) for where, block, _ in found[1:]] == [(path, 1), (path, 2)]


def test_bytes_after_the_end_are_named(dataset: Dataset) -> None:
    shard = dataset.segments.shard(1)
    for path, size in ((shard.path, shard.size_bytes), (shard.docs_path, shard.docs_bytes)):
        raw = dataset.storage.get(path)
        dataset.storage.put(path, raw, b"x")
        assert bad(dataset) == [(path, None, f"the file has {size + 1} bytes, not {size}")]
        dataset.storage.put(path, raw)


def test_missing_files_are_named_and_do_not_stop_the_reading(dataset: Dataset) -> None:
    first, second = dataset.segments
    dataset.storage.delete(first.path)
    dataset.storage.delete(second.docs_path)
    assert bad(dataset) == [
        (first.path, None, "the file is missing"),
        (second.docs_path, None, "the file is missing"),
    ]


def test_flipped_documents_are_named(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).docs_path
    raw = bytearray(dataset.storage.get(path))
    raw[len(raw) // 2] ^= 1
    dataset.storage.put(path, raw)
    assert bad(dataset) == [(path, 0, "the bytes do not match their digest")]


def test_an_identity_that_changed_under_an_open_dataset_is_named(dataset: Dataset) -> None:
    other = msgspec.structs.replace(dataset.info, uuid="f" * 32)
    dataset.storage.put(INFO_KEY, seal(other))
    assert [(found.path, found.block) for found in verify(dataset).bad] == [(INFO_KEY, None)]


def test_shards_of_a_damaged_segment_cannot_be_looked_at_and_the_rest_is(storage: Storage) -> None:
    dataset = make_dataset(storage, [[1]] * 8, name="a")
    dataset = make_dataset(storage, [[1]], name="b")
    assert len(dataset.commit.segments) == 2
    key = f"_segments/{dataset.commit.segments[0].digest}.arrow"
    storage.put(key, b"damaged")
    report = verify(dataset)
    assert [found.path for found in report.bad] == [key]
    assert report.bytes == dataset.commit.segments[1].size_bytes


def test_a_sector_that_cannot_be_read_is_one_bad_block() -> None:
    class BadSector(MemoryStorage):
        @override
        def read_into(self, key: str, start: int, target: Buffer) -> None:
            if key.startswith("shards/") and start == BLOCK_BYTES:
                raise StorageError("input/output error", key=key)
            super().read_into(key, start, target)

    dataset = make_dataset(BadSector(uuid.uuid4().hex), [[2 * BLOCK_BYTES]])
    assert bad(dataset) == [(dataset.segments.shard(0).path, 1, "input/output error")]


def test_digests_that_cannot_belong_to_the_size_are_named() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    storage.put("file", b"ten bytes.")
    blocks = StoredFile("file", 10, bytes(16), block_bytes=4, block_digests=bytes(32))
    found = check_blocks(storage, blocks, chosen=[0], room=Room())
    assert found == [BadBlock("file", None, "its digests do not match its size")]


def test_an_earlier_version_is_verified_without_the_later_one_s_shards(storage: Storage) -> None:
    make_dataset(storage, [[1]], name="a")
    later = make_dataset(storage, [[1]], name="b")
    storage.delete(later.segments.shard(1).path)
    assert verify(open_dataset(storage, version=1)).ok
    assert not verify(later).ok


@pytest.mark.parametrize("field", ["shards", "documents", "tokens", "size_bytes"])
def test_a_commit_that_contradicts_its_segment_is_found(dataset: Dataset, field: str) -> None:
    ref = dataset.commit.segments[0]
    refs = (msgspec.structs.replace(ref, **{field: getattr(ref, field) + 1}),)
    commit = msgspec.structs.replace(dataset.commit, segments=refs, totals=sum_refs(refs))
    dataset.storage.put(commit_key(1), seal(commit))
    found = verify(open_dataset(dataset.storage)).bad
    assert [bad.path for bad in found] == [f"_segments/{ref.digest}.arrow"]


def test_a_sample_reads_its_share_of_the_blocks_and_says_which_seed_drew_them(storage: Storage) -> None:
    dataset = make_dataset(storage, [[5000]] * 20, block_bytes=256)
    report = verify(dataset, sample=0.1, seed=7)
    assert report.of_blocks == sum(-(-shard.size_bytes // 256) + 1 for shard in dataset.segments)
    assert report.blocks == pytest.approx(report.of_blocks / 10, abs=1)
    assert report.bytes < dataset.totals.size_bytes / 5
    assert report == verify(dataset, sample=0.1, seed=report.seed)
    assert report != verify(dataset, sample=0.1, seed=8)


def test_without_a_seed_each_sample_is_another_one(storage: Storage) -> None:
    dataset = make_dataset(storage, [[5000]] * 20, block_bytes=256)
    assert len({verify(dataset, sample=0.1).seed for _ in range(3)}) == 3


def test_samples_find_a_bad_block_as_often_as_their_share_says(storage: Storage) -> None:
    dataset = make_dataset(storage, [[5000]], block_bytes=256)
    shard = dataset.segments.shard(0)
    raw = bytearray(dataset.storage.get(shard.path))
    raw[256 * 11 + 1] ^= 1
    dataset.storage.put(shard.path, raw)
    found = [verify(dataset, sample=0.25, seed=seed).bad for seed in range(200)]
    assert {tuple((bad.path, bad.block) for bad in each) for each in found} == {(), ((shard.path, 11),)}
    assert 25 < sum(map(bool, found)) < 80


def test_a_small_sample_of_a_small_dataset_reads_one_block(storage: Storage) -> None:
    assert verify(make_dataset(storage, [[3]]), sample=1e-9).blocks == 1


@given(st.floats(0.001, 1), st.lists(st.integers(0, 50), max_size=50), st.integers(0, 2**32))
def test_of_any_stretch_of_blocks_the_share_is_drawn(share: float, files: list[int], seed: int) -> None:
    draw = Draw(1 / share, seed=seed)
    for blocks in files:
        chosen = draw.of(blocks)
        assert list(chosen) == sorted(set(chosen) & set(range(blocks)))
        assert abs(draw.drawn - draw.seen * share) <= 1 + 1e-6
    assert draw.seen == sum(files)


@pytest.mark.parametrize(("sample", "deep"), [(0, False), (-0.1, False), (1.5, False), (0.5, True)])
def test_a_share_that_makes_no_sense_is_refused(dataset: Dataset, sample: float, *, deep: bool) -> None:
    with pytest.raises(ConfigError, match="share"):
        verify(dataset, sample=sample, deep=deep)


def forged(storage: Storage, **changes: object) -> Dataset:
    """Return a dataset of two shards, all digests right, whose first shard's row in the manifest has `changes`."""
    tokenizer = put_tokenizer(storage, b"{}", vocab_size=2**16, end_of_text=0)
    shards = [make_shard(storage, f"{index}" * 32, lengths=[3, 4]) for index in range(2)]
    shards[0] = msgspec.structs.replace(shards[0], **changes)
    commit_shards(storage, shards, tokenizer=tokenizer)
    return open_dataset(storage)


def test_what_decodes_as_the_manifest_says_has_no_complaint(storage: Storage) -> None:
    assert verify(forged(storage), deep=True).ok
    with record_writer(MemoryStorage(uuid.uuid4().hex)) as out:
        out.write({"text": "one"})
    assert verify(open_dataset(out.storage), deep=True).ok


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        ({"documents": 3}, "path", "its dtype, documents or tokens are not those that the manifest names"),
        ({"tokens": 8}, "path", "its dtype, documents or tokens are not those that the manifest names"),
        ({"dtype": "uint32"}, "path", "its dtype, documents or tokens are not those that the manifest names"),
        ({"source_last": "x"}, "docs_path", "its first and last source are not those that the manifest names"),
    ],
)
def test_a_manifest_that_says_something_else_is_found_by_decoding(
    storage: Storage, changes: dict[str, object], place: str, reason: str
) -> None:
    dataset = forged(storage, **changes)
    assert verify(dataset).ok
    found = verify(dataset, deep=True).bad
    assert [(bad.path, bad.reason) for bad in found] == [(getattr(dataset.segments.shard(0), place), reason)]


def test_an_id_beyond_the_vocabulary_is_found_by_decoding(storage: Storage) -> None:
    tokenizer = put_tokenizer(storage, b"{}", vocab_size=2, end_of_text=0)
    shard = make_shard(storage, "a" * 32, lengths=[300])
    commit_shards(storage, [shard], tokenizer=tokenizer)
    found = verify(open_dataset(storage), deep=True).bad
    assert [bad.path for bad in found] == [shard.path]
    assert found[0].reason.endswith("the tokenizer has 2")


def test_documents_of_another_shard_are_found_by_decoding(storage: Storage) -> None:
    one = make_shard(storage, "1" * 32, lengths=[3, 4])
    other = make_shard(storage, "2" * 32, lengths=[4, 3])
    names = ("docs_path", "docs_bytes", "docs_digest")
    commit_shards(storage, [msgspec.structs.replace(one, **{name: getattr(other, name) for name in names})])
    found = verify(open_dataset(storage), deep=True).bad
    assert [bad.reason for bad in found] == ["its rows do not count the tokens of the shard's rows"]


def test_a_record_shard_with_other_rows_is_found_by_decoding() -> None:
    with record_writer(MemoryStorage(uuid.uuid4().hex)) as out:
        out.write({"text": f"{index}"} for index in range(3))
    shard = msgspec.structs.replace(next(iter(open_dataset(out.storage).segments)), documents=4)
    assert out.schema is not None
    commit_records(out.storage, [shard], schema=out.schema, operation="overwrite")
    assert [bad.reason for bad in verify(open_dataset(out.storage), deep=True).bad] == ["it has 3 rows, not 4"]


def deleted(storage: Storage, rows: dict[str, list[int]], lengths: dict[str, list[int]]) -> Dataset:
    dataset = forged(storage)
    table = store_deletions(
        storage,
        {uid: np.array(numbers, np.int32) for uid, numbers in rows.items()},
        lengths={uid: np.array(counts) for uid, counts in lengths.items()},
    )
    commit = msgspec.structs.replace(dataset.commit, deletions=(table,))
    commit = msgspec.structs.replace(commit, totals=sum_refs(commit.segments, commit.deletions))
    storage.put(commit_key(1), seal(commit))
    return open_dataset(storage)


@pytest.mark.parametrize(
    ("rows", "lengths", "reason"),
    [
        ({"0" * 32: [1]}, {"0" * 32: [3, 4]}, None),
        ({"0" * 32: [2]}, {"0" * 32: [3, 4, 5]}, "row 2 of it is deleted, it has 2"),
        ({"0" * 32: [1]}, {"0" * 32: [4, 3]}, "its deleted rows are not where the deletions say"),
        ({"f" * 32: [0]}, {"f" * 32: [4]}, f"it deletes rows of a shard that is not in this version ({'f' * 32})"),
    ],
)
def test_deletions_that_do_not_fit_the_shards_are_found_by_decoding(
    storage: Storage, rows: dict[str, list[int]], lengths: dict[str, list[int]], reason: str | None
) -> None:
    dataset = deleted(storage, rows, lengths)
    assert verify(dataset).ok
    assert [bad.reason for bad in verify(dataset, deep=True).bad] == ([] if reason is None else [reason])


def test_damage_is_told_once_however_deep_one_looks(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).path
    raw = bytearray(dataset.storage.get(path))
    raw[-20] ^= 1
    dataset.storage.put(path, raw)
    assert verify(dataset, deep=True).bad == verify(dataset).bad
    assert len(verify(dataset).bad) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": 2**62, "block_bytes": 2**62},
        {"size_bytes": 2**62, "block_bytes": 1},
        {"block_bytes": 2**31},
        {"block_bytes": 7},
        {"block_digests": b""},
        {"block_digests": bytes(17)},
        {"tokens": 10**6},
        {"tokens": 2**62},
        {"documents": 10**6},
        {"documents": 2**62},
        {"values_start": 10**6},
        {"offsets_start": 10**6},
    ],
)
def test_a_shard_that_is_larger_than_its_file_is_refused_with_its_segment(
    storage: Storage, change: dict[str, object]
) -> None:
    dataset = forged(storage, **change)
    (found,) = verify(dataset).bad
    assert found.path.startswith("_segments/")
    assert "larger than its file" in found.reason


@pytest.mark.parametrize("change", [{"path": "../../secret"}, {"docs_path": "docs/../../secret"}, {"path": ""}])
def test_a_segment_that_leads_out_of_the_dataset_is_named_and_not_followed(
    storage: Storage, change: dict[str, str]
) -> None:
    dataset = forged(storage, **change)
    (found,) = verify(dataset).bad
    assert found.path.startswith("_segments/")
    with pytest.raises(CorruptError):
        dataset.token_shard(0)


def test_a_whole_path_is_no_rank_of_a_dataset_that_refers_to_no_other(storage: Storage) -> None:
    dataset = forged(storage, path="/etc/passwd")
    assert [(bad.path, bad.reason) for bad in verify(dataset).bad] == [("/etc/passwd", "not a valid key")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of texts and their tokens."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "src").mkdir()
    for index in range(100):
        (folder / "src" / f"{index:03}.txt").write_text(f"naïve cats sit on mat {index} " * 5)
    raw = train_tokenizer([str(folder / "src")], settings=TokenizerSettings(vocab_size=320))
    (folder / "tok.json").write_bytes(raw)
    settings = IngestSettings(tokenizer=str(folder / "tok.json"), workers=1)
    ingest([str(folder / "src")], str(folder / "set"), settings=settings)
    return folder / "set"


def test_texts_are_what_their_tokens_say(texts: Path) -> None:
    assert verify(open_dataset(texts), deep=True).ok


@pytest.mark.parametrize("end", [False, True])
def test_tokens_that_are_not_the_text_that_they_came_from_are_found_by_decoding(texts: Path, *, end: bool) -> None:
    dataset = open_dataset(texts)
    storage = MemoryStorage(uuid.uuid4().hex)
    tokenizer = dataset.commit.tokenizer
    assert tokenizer is not None
    put_tokenizer(
        storage, dataset.tokenizer() or b"", vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text
    )
    values, offsets = dataset.token_shard(0)
    changed = values.copy()
    # An end of text within a document may stand for a text that spells it: then nobody can tell.
    changed[1] = tokenizer.end_of_text if end else changed[1] + 1
    shard = write_token_shard(storage, uid="a" * 32, values=changed, offsets=offsets, documents=dataset.documents(0))
    commit_shards(storage, [shard], tokenizer=tokenizer)
    found = verify(open_dataset(storage), deep=True).bad
    assert [bad.reason for bad in found] == (
        [] if end else ["the tokens of row 0 are not the text that its documents file names"]
    )


@pytest.mark.parametrize(
    "raw", [b"[]", b"null", b'{"model": "tiny"}', b'{"model": {"type": "BPE"}, "decoder": 3}', b"\xff"]
)
def test_a_tokenizer_that_makes_no_sense_decodes_nothing_and_hides_nothing(storage: Storage, raw: bytes) -> None:
    tokenizer = put_tokenizer(storage, raw, vocab_size=2**16, end_of_text=0)
    commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[3, 4])], tokenizer=tokenizer)
    assert verify(open_dataset(storage), deep=True).ok

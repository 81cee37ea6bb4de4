"""A decoder that is handed damaged bytes without their digest raises, or reads something; it never crashes or hangs.

Digests find every flip before a decoder sees it. This is the second line: files that some other writer made, by mistake
or on purpose. What is written in C++ runs in a process of its own, `decoder_program.py`; by hand, for the figures:

    .venv/bin/python tests/property/decoder_program.py segment 0 100000
"""

import json
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.verify import verify
from datastore.dataset.journal import Journal, TaskDone
from datastore.dataset.log.keys import INFO_KEY
from datastore.dataset.operations.append import commit_records, commit_shards
from datastore.dataset.shards.files import put_tokenizer, read_token_shard
from datastore.dataset.shards.info import BatchRange, ColumnLayout, ShardInfo, ShardLayout
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_hex
from datastore.document import Sealed, decode, encode, seal, unseal
from datastore.errors import ConfigError, CorruptError, DatastoreError, FormatError, StorageError
from datastore.formats.schema import decode_schema, encode_schema
from datastore.formats.tokens import decode_tokens, encode_tokens
from datastore.ingestion.reading.documents import Reject, decode_rejects, encode_rejects
from datastore.ingestion.writers.records import record_writer
from datastore.loader.loader import Loader
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_shard

PROGRAM = Path(__file__).with_name("decoder_program.py")
DECODERS = subprocess.run([sys.executable, PROGRAM, "--list"], capture_output=True, text=True, check=True).stdout
CASES = sorted((Path(__file__).parents[2] / "schemas" / "cases").rglob("good-*.json"))


@pytest.mark.parametrize("name", DECODERS.splitlines())
@pytest.mark.parametrize(
    ("seed", "inputs"), [(0, 1500), pytest.param(1, 100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_damage_is_an_error_or_another_value(name: str, seed: int, inputs: int) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, name, str(seed), str(inputs)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    *_, last = done.stdout.splitlines()
    assert done.returncode == 0, f"input {last} of seed {seed} ended it with {done.returncode}: {done.stderr[-2000:]}"
    accepted = int(last.split()[1])
    # If all or nothing were refused, this would test the reader of the first bytes only.
    assert 0.01 * inputs < accepted < 0.9 * inputs


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """Return `raw` with a few bytes changed, perhaps cut."""

    def change(edits: list[tuple[int, int]], stop: int) -> bytes:
        out = bytearray(raw)
        for place, mask in edits:
            out[place] ^= mask
        return bytes(out[:stop])

    edits = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), min_size=1, max_size=6)
    return st.builds(change, edits, st.one_of(st.just(len(raw)), st.integers(0, len(raw))))


@cache
def stored() -> dict[str, type[Sealed]]:
    """Return every stored document of the package, as `tools/schemas.py` finds them."""
    tool = Path(__file__).parents[2] / "tools" / "schemas.py"
    namespace: dict[str, Any] = {"__name__": "schemas_tool", "__file__": str(tool)}
    exec(compile(tool.read_text(), str(tool), "exec"), namespace)  # our own tool
    found: dict[str, type[Sealed]] = namespace["documents"]()
    return found


def kind_of(case: Path) -> type[Sealed]:
    return stored()["/".join(case.parts[-3:-1])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.parts[-3:]))
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_damaged_document_is_refused_or_is_one(case: Path, data: st.DataObject) -> None:
    raw = data.draw(damaged(case.read_bytes()))
    try:
        found = decode(kind_of(case), raw, where="here")
    except CorruptError:
        return
    assert decode(kind_of(case), encode(found), where="here") == found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.parts[-3:]))
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_sealed_document_is_refused_whatever_was_damaged(case: Path, data: st.DataObject) -> None:
    sealed = seal(decode(kind_of(case), case.read_bytes(), where="here"))
    raw = data.draw(damaged(sealed))
    if raw != sealed:
        with pytest.raises((CorruptError, FormatError)):
            unseal(kind_of(case), raw, where="here")


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.parts[-3:]))
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_document_with_any_value_in_any_place_is_refused_or_is_one(case: Path, data: st.DataObject) -> None:
    document = json.loads(case.read_bytes())
    part = document
    while isinstance(part, dict | list) and part:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if data.draw(st.booleans()) or not isinstance(part[key], dict | list):
            part[key] = data.draw(anything)
            break
        part = part[key]
    try:
        found = decode(kind_of(case), json.dumps(document).encode(errors="surrogatepass"), where="here")
    except CorruptError:
        return
    assert decode(kind_of(case), encode(found), where="here") == found


@pytest.mark.parametrize("raw", [b"", b"null", b"[" * 10**6, b'{"a":' * 10**5, b"\xff", b"1e999", b'{"format": 1e400}'])
@pytest.mark.parametrize("kind", sorted(stored()))
def test_what_is_no_document_at_all_is_refused(kind: str, raw: bytes) -> None:
    with pytest.raises(CorruptError):
        unseal(stored()[kind], raw, where="here")


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_schema_is_refused_or_is_one(data: st.DataObject) -> None:
    raw = encode_schema(pa.schema({"text": pa.string(), "labels": pa.list_(pa.string()), "image": pa.binary()}))
    raw = data.draw(damaged(raw))
    try:
        assert len(decode_schema(raw).names) <= len(raw)
    except CorruptError:
        return


# ---- Values that are well-formed and make no sense ------------------------------------------------------------------

monstrous = st.sampled_from([0, 1, 2, 3, 7, 64, 65, 2**31, 2**32, 2**40, 2**62, 2**63 - 1])
paths = st.sampled_from(
    ["../outside/secret", "a/../../outside/secret", "", ".", "a//b", "a\\b", "a\0b", "shards/ab", "datastore.json"]
)
columns = st.builds(
    ColumnLayout,
    name=st.sampled_from(["mask", "tokens", "", "a/b"]),
    dtype=st.sampled_from(["uint8", "float32", "O", "V9999999", "", "datetime64[ns]"]),
    width=monstrous.filter(bool),
    values_start=monstrous,
)
batches = st.builds(BatchRange, start=monstrous, stop=monstrous, rows=monstrous, digest=st.binary(max_size=16))
layouts = st.builds(
    ShardLayout,
    columns=st.lists(columns, max_size=2).map(tuple),
    batches=st.lists(batches, max_size=3).map(tuple),
    frame_digest=st.binary(max_size=16),
    format=st.sampled_from(["arrow", "parquet"]),
)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(["documents", "tokens", "size_bytes", "values_start", "offsets_start", "docs_bytes"], monstrous),
    "block_bytes": monstrous.filter(bool),
    "block_digests": st.binary(max_size=40),
    "path": paths,
    "docs_path": paths,
    "dtype": st.sampled_from(["uint16", "uint32", ""]),
    "kind": st.sampled_from(["tokens", "records"]),
    "offsets_dtype": st.sampled_from(["int32", ""]),
    "layout": layouts,
}
changes = st.dictionaries(st.sampled_from(sorted(CHANGES)), st.none(), min_size=1, max_size=3).flatmap(
    lambda chosen: st.fixed_dictionaries({name: CHANGES[name] for name in chosen})
)
REFUSALS = (CorruptError, FormatError, StorageError)
"""A file that ends too early is a `StorageError`."""


def read_all(dataset: Dataset) -> None:
    """Read everything, each part by itself; what is refused is refused with an error that says so."""
    parts: list[Callable[[], object]] = [
        lambda: list(dataset.segments),
        lambda: dataset.segments.columns,
        lambda: dataset.segments.column_start("mask"),
        lambda: dataset.segments.itemsize.sum() + dataset.segments.uid64.size,
    ]
    for index in range(dataset.commit.totals.shards):
        if dataset.kind == "tokens":
            parts += [lambda i=index: dataset.token_shard(i), lambda i=index: dataset.live_documents(i)]  # type: ignore[misc]
        else:
            parts += [lambda i=index: dataset.record_shard(i), lambda i=index: dataset.read_batch(i, 0)]  # type: ignore[misc]
    for part in parts:
        try:
            part()
        except (*REFUSALS, FileNotFoundError, IndexError):
            continue


@settings(deadline=None, max_examples=150)
@given(changes)
def test_a_manifest_that_makes_no_sense_is_refused_or_harmless(change: dict[str, Any]) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    shards = [make_shard(storage, f"{index}" * 32, lengths=[3, 4]) for index in range(2)]
    shards[1] = msgspec.structs.replace(shards[1], **change)
    if shards[1].kind == "tokens":
        try:
            commit_shards(storage, shards)
        except (CorruptError, ConfigError):  # Sums that overflow; shards that do not go together.
            return
        dataset = open_dataset(storage)
        read_all(dataset)
        verify(dataset)
        verify(dataset, deep=True)


@settings(deadline=None, max_examples=150)
@given(changes)
def test_a_manifest_of_records_that_makes_no_sense_is_refused_or_harmless(change: dict[str, Any]) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    with record_writer(storage) as out:
        out.write({"text": f"{index}"} for index in range(100))
    shard = msgspec.structs.replace(next(iter(open_dataset(storage).segments)), **change)
    if shard.kind == "records":
        assert out.schema is not None
        try:
            commit_records(storage, [shard], schema=out.schema, operation="overwrite")
        except (CorruptError, ConfigError):
            return
        dataset = open_dataset(storage)
        read_all(dataset)
        verify(dataset)
        verify(dataset, deep=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "change", [{"path": "../outside"}, {"layout": "bad"}, {"dtype": "uint32"}, {"values_start": 3}, {"tokens": 705}]
)
def test_a_loader_is_told_of_a_shard_that_makes_no_sense_and_does_not_wait_for_it(change: dict[str, Any]) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    tokenizer = put_tokenizer(storage, b"{}", vocab_size=2**16, end_of_text=0)
    shards = [make_shard(storage, f"{index}" * 32, lengths=[300, 400]) for index in range(3)]
    if change == {"layout": "bad"}:
        change = {"layout": ShardLayout(columns=(ColumnLayout(name="loss_mask", dtype="uint8", values_start=10**9),))}
        shards = [msgspec.structs.replace(shard, **change) for shard in shards]
    shards[1] = msgspec.structs.replace(shards[1], **change)
    commit_shards(storage, shards, tokenizer=tokenizer)
    try:
        with Loader(open_dataset(storage), seq_len=16, global_batch=4) as loader:
            assert all(batch.tokens.shape == (4, 17) for batch in islice(loader, 60))
    except CorruptError:
        return
    # Numbers that lead to other bytes of the same file cannot be told from right ones.
    assert change in ({"values_start": 3}, {"tokens": 705})


@pytest.mark.parametrize("path", ["../outside/shard.arrow", "shards/../../outside/shard.arrow"])
def test_a_sound_file_outside_the_dataset_is_not_read(tmp_path: Path, path: str) -> None:
    outside = make_shard(LocalStorage(tmp_path / "outside"), "a" * 32, lengths=[3])
    (tmp_path / "outside" / "shard.arrow").write_bytes((tmp_path / "outside" / outside.path).read_bytes())
    storage = LocalStorage(tmp_path / "set")
    shard: ShardInfo = make_shard(storage, "a" * 32, lengths=[3])
    assert shard.digest == outside.digest
    commit_shards(storage, [msgspec.structs.replace(shard, path=path)])
    with pytest.raises(CorruptError):
        open_dataset(tmp_path / "set").token_shard(0)
    with pytest.raises(ConfigError):
        read_token_shard(storage, msgspec.structs.replace(shard, path=path))


def test_a_whole_path_is_read_by_no_dataset_that_is_no_clone(tmp_path: Path) -> None:
    outside = make_shard(LocalStorage(tmp_path / "outside"), "a" * 32, lengths=[3])
    storage = LocalStorage(tmp_path / "set")
    commit_shards(storage, [msgspec.structs.replace(outside, path=str(tmp_path / "outside" / outside.path))])
    with pytest.raises(DatastoreError):
        open_dataset(tmp_path / "set").token_shard(0)


def test_the_identity_of_another_dataset_does_not_lead_elsewhere(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "set")
    commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[3])])
    raw = storage.get(INFO_KEY).replace(b'"features": []', b'"features": ["placement"]')
    storage.put(INFO_KEY, raw)
    with pytest.raises(CorruptError):
        open_dataset(tmp_path / "set")


def test_a_column_with_more_values_than_there_are_tokens_is_refused() -> None:
    mask = np.ones(2, np.uint8)
    raw = bytearray(encode_tokens(np.array([1, 2], np.uint16), np.array([0, 2]), columns={"loss_mask": mask}).data)
    numbers = [struct.unpack_from("<qq", raw, at) for at in range(0, len(raw) - 15, 8)]
    # The length of its array, and of its buffer, which has room to the next multiple of 64.
    array = [place for place, found in enumerate(numbers) if found == (2, 0)][1]
    buffer = next(place for place, (start, length) in enumerate(numbers) if start > 0 == start % 64 and length == 2)
    struct.pack_into("<q", raw, 8 * array, 3)
    struct.pack_into("<q", raw, 8 * buffer + 8, 3)
    with pytest.raises(CorruptError, match="its column loss_mask has more values than its tokens"):
        decode_tokens(raw)


REJECTS = encode_rejects([Reject("a.jsonl", 7, "invalid_json", '{"x": "ä')] * 3)


@settings(deadline=None)
@given(damaged(REJECTS))
def test_damaged_rejects_are_refused_or_are_some(raw: bytes) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    storage.put("ingests/one/rejects/task.jsonl", raw)
    try:
        assert sum(
            len(list(decode_rejects(found, where=key))) for key, found in Journal(storage, "one").rejects()
        ) <= raw.count(b"\n")
    except CorruptError:
        return


@given(st.binary(max_size=100))
def test_ids_of_an_ingest_are_whole_digests(raw: bytes) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    storage.put("ingests/one/ids/task.bin", raw)
    case = next(case for case in CASES if case.parts[-2] == "TaskDone")
    done = decode(TaskDone, case.read_bytes(), where="here")
    done = msgspec.structs.replace(done, task_id="task", ids_digest=digest_hex(raw))
    if len(raw) % 16:
        with pytest.raises(CorruptError):
            Journal(storage, "one").ids(done)
    else:
        assert Journal(storage, "one").ids(done).tobytes() == raw

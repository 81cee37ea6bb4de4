"""Files of any sizes, cut into row groups or record batches in any way: each row once an epoch, whoever reads, whoever goes on."""

import itertools
import tempfile
import uuid
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.loader.rows.batch import Rows
from datastore.loader.rows.files.opening import FileRows, open_files
from datastore.loader.rows.loader import RowLoader
from datastore.loader.rows.sampling import Stratified
from datastore.loader.settings import LoaderSettings, Rank
from datastore.storage.backends.memory import MemoryStorage

files = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=5).filter(
    lambda each: sum(rows for rows, _ in each) > 0
)
"""Rows of each file, and of its batches."""

kinds = st.sampled_from(["parquet", "stream"])


def written(parts: list[tuple[int, int]], kind: str) -> FileRows:
    storage, names, start = MemoryStorage(uuid.uuid4().hex), [], 0
    for number, (rows, size) in enumerate(parts):
        numbers = list(range(start, start + rows))
        table = pa.table(
            {"number": pa.array(numbers, pa.int64()), "text": pa.array([f"row {n}" for n in numbers], pa.string())}
        )
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(table, sink, row_group_size=size)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=size)
        names.append(f"{number}.parquet" if kind == "parquet" else f"data-{number}.arrow")
        storage.put(names[-1], sink.getvalue())
        start += rows
    if kind == "stream":
        storage.put("state.json", orjson.dumps({"_data_files": [{"filename": name} for name in names]}))
    with tempfile.TemporaryDirectory() as index:
        return open_files(storage, index=index)


def load(source: FileRows, **options: Any) -> RowLoader:
    chosen = {name: options.pop(name) for name in ("rank", "rows") if name in options}
    batch = options.pop("batch")
    settings = LoaderSettings(**{"threads": 0, "prefetch_batches": 0, "window": 8, "epochs": 2} | options)
    return RowLoader(source, global_batch=batch, seed=3, options=settings, **chosen)


@settings(max_examples=60)
@given(files, kinds, st.data())
def test_each_row_comes_once_an_epoch_over_worlds_that_change(
    parts: list[tuple[int, int]], kind: str, data: st.DataObject
) -> None:
    source = written(parts, kind)
    total = sum(rows for rows, _ in parts)
    rows = Rows(sample=data.draw(st.sampled_from([None, Stratified("text")]), label="sample"))
    seen: dict[int, int] = {}
    state: dict[str, Any] | None = None
    for _ in range(200):
        world = data.draw(st.integers(1, 4), label="world")
        batch = data.draw(st.integers(max(world, total // 4), total + 4), label="batch")
        ranks = [load(source, batch=batch, rank=Rank(rank, world), rows=rows) for rank in range(world)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        taken = [next(loader, None) for loader in ranks]
        assert len({part is None for part in taken}) == 1
        for part in taken:
            if part is not None:
                assert part.data["text"].to_pylist() == [f"row {number}" for number in part.numbers.tolist()]
                seen |= dict(zip(part.positions.tolist(), part.data["number"].to_pylist(), strict=True))
        if taken[0] is None:
            break
        state = ranks[0].state_dict()
    assert sorted(seen) == list(range(2 * total))
    for epoch in range(2):
        assert sorted(seen[position] for position in range(epoch * total, (epoch + 1) * total)) == list(range(total))


@settings(max_examples=40)
@given(files, kinds, st.integers(0, 2**20))
def test_memory_and_threads_change_nothing(parts: list[tuple[int, int]], kind: str, memory_bytes: int) -> None:
    source = written(parts, kind)
    wanted = [batch.numbers.tolist() for batch in load(source, batch=7)]
    with load(source, batch=7, memory_bytes=2**30, threads=2, prefetch_batches=4) as threads:
        assert [batch.numbers.tolist() for batch in threads] == wanted
    store = load(source, batch=7, memory_bytes=2**30)
    store._assembler.store._budget_bytes = memory_bytes
    assert [batch.data["number"].to_pylist() for batch in store] == wanted
    assert sorted(itertools.chain.from_iterable(wanted)) == sorted([*range(sum(rows for rows, _ in parts))] * 2)

"""Shards as tables of Hugging Face `datasets`: mapped, and opened again by path in its worker processes."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from datasets.table import ConcatenationTable, InMemoryTable, MemoryMappedTable
from typing_extensions import override

from datastore.dataset.query.readable import Readable
from datastore.formats.huggingface import check_hf_types, with_features
from datastore.formats.schema import no_rows

__all__ = ["MappedShard", "mapped_dataset"]


class MappedShard(MemoryMappedTable):  # type: ignore[misc]  # datasets has no types
    """A mapped Arrow file. The library's own class expects the stream format, which has no index of its batches."""

    def __init__(self, table: pa.Table, path: str, replays: list[Any] | None = None) -> None:
        super().__init__(table, path, replays)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        table = self._apply_replays(_map(state["path"]), state["replays"])
        MappedShard.__init__(self, table, state["path"], state["replays"])


def _keeping_class(name: str) -> Any:
    def transform(self: MappedShard, *arguments: Any, **options: Any) -> MappedShard:
        found = getattr(MemoryMappedTable, name)(self, *arguments, **options)
        return MappedShard(found.table, found.path, found.replays)

    return transform


# Its methods name the class that they return, so that a `select` would forget how to open the file again.
for _name, _member in vars(MemoryMappedTable).items():
    if callable(_member) and not _name.startswith("_"):
        setattr(MappedShard, _name, _keeping_class(_name))


def mapped_dataset(dataset: Readable) -> Dataset:
    """Return what `Dataset.to_hf` promises."""
    schema = dataset.schema if dataset.kind == "records" else dataset.token_schema
    check_hf_types(schema)
    blocks: list[Any] = []
    live: list[np.ndarray[Any, Any]] = []
    start = 0
    for index, shard in enumerate(dataset.segments):
        rows = dataset.live_rows(index)
        live.append(np.arange(start, start + shard.documents) if rows is None else start + np.flatnonzero(rows))
        start += shard.documents
        path = dataset.storage.local_path(shard.path)
        if path is not None and shard.layout.format == "arrow" and _map(str(path)).schema.equals(schema):
            blocks.append(MappedShard(_map(str(path)), str(path)))
        else:
            blocks.append(
                InMemoryTable(dataset.record_shard(index) if dataset.kind == "records" else dataset.token_lists(index))
            )
    table = ConcatenationTable.from_tables(blocks or [InMemoryTable(pa.Table.from_batches([no_rows(schema)]))])
    # Through bytes, as from a file: this is where its extension types come into being.
    features = Features.from_arrow_schema(pa.ipc.read_schema(with_features(schema).serialize()))
    if features.arrow_schema.types != table.schema.types:
        table = table.cast(features.arrow_schema)
    found = Dataset(table, info=DatasetInfo(features=features))
    return found.select(np.concatenate(live)) if dataset.deletions else found


def _map(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).read_all()

"""No operation holds more than 64 descriptors, however many shards there are; each runs under that limit."""

import subprocess
import sys
from pathlib import Path

import pytest

import datastore as ds

PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.compute as pc, pyarrow.dataset, duckdb
import datastore as ds
from datastore.ingestion.writers import records as record_writer, tokens as token_writer

SHARDS = 300
folder = Path(sys.argv[1])
records, tokens, text = (str(folder / name) for name in ("records", "tokens", "text"))
record_writer._SHARD_BYTES = token_writer._SHARD_BYTES = 1  # Each write is a shard.
ds.export_dataset(ds.open(sys.argv[2]), str(folder / "warm"), format="parquet")
ds.open(sys.argv[2]).sql("SELECT count(*) FROM records")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

with ds.record_writer(records, schema={"a": "int64", "kind": "dictionary<string>"}) as out:
    for number in range(SHARDS):
        out.write({"a": number, "kind": str(number % 7)})
with ds.token_writer(tokens, vocab_size=99) as out:
    for number in range(SHARDS):
        out.write(np.arange(9), id=str(number), source="s")
(folder / "in").mkdir()
for number in range(SHARDS):
    (folder / "in" / f"{number}.txt").write_text(f"text {number}")
ds.ingest([str(folder / "in")], text, settings=ds.IngestSettings(workers=1))
print("ingest", ds.open(text).totals.documents, len(ds.open(records).segments), len(ds.open(tokens).segments))

def rows(name, **more):
    return sorted(ds.open(name).to_arrow(**more).column(0).to_pylist())

print("read", rows(records) == list(range(SHARDS)), len(rows(tokens, tokens=True)))
print("iterate", sum(batch.num_rows for batch in ds.open(records).iter_batches()))
print("sql", ds.open(records).sql("SELECT count(*) AS n FROM records").to_pylist())
print("scan", ds.open(records).arrow_dataset().count_rows())
print("delete", ds.delete(records, where=pc.field("a") == 1).documents, ds.delete(tokens, ids=["1"]).documents)
print("sql", ds.open(records).sql("SELECT count(*) AS n FROM records").to_pylist())
ds.evolve(records, add={"b": "int8"}, rename={"a": "c"})
print("evolve", ds.open(records).to_arrow().column_names)
print("verify", ds.verify(ds.open(records)).ok, ds.verify(ds.open(tokens)).ok)
ds.export_dataset(ds.open(records), str(folder / "out"), format="parquet", shard_bytes=1)
ds.import_dataset(str(folder / "out"), str(folder / "back"), format="parquet", settings=ds.IngestSettings(workers=1))
print("export", len(list((folder / "out").iterdir())), rows(str(folder / "back")) == rows(records))
ds.clone(ds.open(records), str(folder / "copy"))
print("clone", rows(str(folder / "copy")) == rows(records))
for name in (records, tokens):
    report = ds.compact(name)
    print("compact", report.shards_before, report.shards_after, ds.open(name).totals.documents)
"""

PRINTED = """
ingest 300 300 300
read True 300
iterate 300
sql [{'n': 300}]
scan 300
delete 1 1
sql [{'n': 299}]
evolve ['c', 'kind', 'b']
verify True True
export 299 True
clone True
compact 300 1 299
compact 300 1 299
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_every_operation_works_on_300_shards_with_64_descriptors(tmp_path: Path) -> None:
    with ds.record_writer(str(tmp_path / "warm")) as out:
        out.write({"a": 1})
    (tmp_path / "many").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "many"), str(tmp_path / "warm")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip().splitlines() == PRINTED.strip().splitlines(), done.stderr

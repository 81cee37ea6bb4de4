"""Write schemas/golden/v<N>: a tiny dataset of each kind in the present format, and what a reader must find in it.

Run once when a format version is released, never again: every later version of the package must read these very
bytes, so a folder that exists is left alone. `expected.json` says what is in them in plain JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.tags import set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import put_tokenizer, shard_uid, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_bytes
from datastore.document import Sealed
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.base import Storage

FOLDER = Path(__file__).resolve().parent.parent / "schemas" / "golden" / f"v{Sealed.newest_format}"
WORDS = ["<end>", "the", "cat", "sat", "on", "mat", "a", "dog"]
TEXTS = [["the cat sat on the mat", "", "a dog"], ["a cat on a dog"], ["the dog sat", "mat"]]
ROWS = [
    {"text": "ein Hund", "labels": ["dog"], "image": b"\x00\xff"},
    {"text": None, "labels": [], "image": None},
]


def main() -> int:
    """Write the folder; return the exit status."""
    if FOLDER.exists():
        print(f"error: {FOLDER} is there; what was released once is never written again")
        return 1
    expected = {"tokens": tokens(FOLDER / "tokens"), "records": records(FOLDER / "records")}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def tokens(folder: Path) -> dict[str, Any]:
    """Write two versions, a tag and a tokenizer; return what they hold."""
    storage = LocalStorage(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    raw = tokenizer.to_str().encode()
    ref = put_tokenizer(storage, raw, vocab_size=len(WORDS), end_of_text=0)
    shards = [shard(storage, index, texts, tokenizer) for index, texts in enumerate(TEXTS)]
    set_tag(storage, "first", commit_shards(storage, shards[:2], tokenizer=ref, ingest_id="golden-1"))
    commit_shards(storage, shards[2:], tokenizer=ref, ingest_id="golden-2", config_digest="0" * 32)
    log = CommitLog(storage)
    return {
        "uuid": open_dataset(storage).uuid,
        "tokenizer": raw.decode(),
        "tags": {"first": 1},
        "commits": {str(version): log.stored(version).sha256 for version in (1, 2)},
        "versions": {str(version): contents(open_dataset(storage, version=version)) for version in (1, 2)},
    }


def shard(storage: Storage, index: int, texts: list[str], tokenizer: Tokenizer) -> ShardInfo:
    """Store one shard of `texts`, each ended by id 0."""
    ids = [[*tokenizer.encode(text).ids, 0] for text in texts]
    counts = np.array([len(found) for found in ids], np.int64)
    lengths = np.array([len(text.encode()) for text in texts], np.int64)
    documents = pa.table(
        {
            "id": [f"{index}-{row}" for row in range(len(texts))],
            "source": [f"text/{index}.txt"] * len(texts),
            "offset": np.cumsum(lengths + 1) - (lengths + 1),
            "length": lengths,
            "tokens": counts,
            "digest": pa.array([digest_bytes(text.encode()) for text in texts], pa.binary(16)),
        },
        schema=DOCUMENTS_SCHEMA,
    )
    return write_token_shard(
        storage,
        uid=shard_uid("golden", index),
        values=np.concatenate([np.array(found, np.uint16) for found in ids]),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        documents=documents,
    )


def contents(dataset: Dataset) -> list[dict[str, Any]]:
    """Return what the shards of `dataset` hold."""
    found = []
    for index, info in enumerate(dataset.segments):
        values, offsets = dataset.token_shard(index)
        rows = [{**row, "digest": row["digest"].hex()} for row in dataset.documents(index).to_pylist()]
        tokens = [part.tolist() for part in np.split(values, offsets[1:-1])]
        found.append({"uid": info.uid, "tokens": tokens, "documents": rows})
    return found


def records(folder: Path) -> dict[str, Any]:
    """Write one version of records; return what it holds."""
    schema = pa.schema({"text": pa.string(), "labels": pa.list_(pa.string()), "image": pa.binary()})
    with record_writer(LocalStorage(folder), schema=schema) as out:
        out.write(ROWS)
    return {
        "schema": str(schema),
        "rows": [{**row, "image": row["image"].hex() if row["image"] is not None else None} for row in ROWS],
    }


if __name__ == "__main__":
    sys.exit(main())

"""Hands damaged bytes to one decoder, in a process of its own: a decoder written in C++ may end it, or never return.

    python decoder_program.py DECODER SEED COUNT

Input `i` is a function of the decoder's samples, SEED and `i`. The number of each is printed before it is decoded, so
that whoever started this knows which one ended it. Memory is limited, and an alarm ends an input that takes too long.
"""

import random
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.dataset.shards.deletions import Deletions, decode_deletions, encode_deletions
from datastore.dataset.shards.parity_groups import Group, Member, decode_groups, encode_groups
from datastore.dataset.shards.segment_file import decode_segment, encode_segment, segment_of
from datastore.dataset.shards.segments import Segments
from datastore.errors import CorruptError
from datastore.formats.documents import DOCUMENTS_SCHEMA, decode_documents, encode_documents
from datastore.formats.records import RecordFormat, decode_batch, decode_records, encode_records, read_frame
from datastore.formats.tokens import decode_token_table, decode_tokens, encode_tokens
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import documents_of, make_shard

LIMIT_S = 20
"""What one input may take, on a busy machine too."""

ROOM_BYTES = 3 * 2**30
"""Address space beyond what the process has once everything is imported; Arrow's allocator reserves it by the GiB."""

SMALL_BYTES = 128 * 2**20
"""What the process may grow by over all inputs, each of a few kilobytes. Address space is another matter: Parquet asks
for what a page says of itself, up to 2 GiB, but what nobody touches takes no memory."""


def resident() -> int:
    """Return the most memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_segment(raw: bytes) -> None:
    segments = Segments([decode_segment(raw, where="here")])
    assert len(list(segments)) == len(segments) <= len(raw)
    assert segments.tokens.size == segments.uid64.size == segments.itemsize.size == len(segments)
    assert min((segments.tokens.min(), segments.block_bytes.min(), segments.values_start.min())) >= 0
    segments.digests_of(["0" * 32])


def read_tokens(raw: bytes) -> None:
    table = decode_token_table(raw)
    values, offsets = table.values, table.offsets
    assert all(len(column) == values.size for column in table.columns.values())
    assert decode_tokens(raw)[0].size == values.size
    assert values.nbytes + 4 * offsets.size <= len(raw)
    assert offsets[0] == 0
    assert offsets[-1] == values.size == sum(int(count) for count in np.diff(offsets))
    assert int(values.astype(np.int64).sum()) >= 0


def read_documents(raw: bytes) -> None:
    table = decode_documents(raw)
    assert table.schema.equals(DOCUMENTS_SCHEMA)
    assert len(table.to_pylist()) == table.num_rows
    assert all(column.null_count == 0 for column in table.columns)


def read_arrow(raw: bytes) -> None:
    read_rows(raw, "arrow")


def read_parquet(raw: bytes) -> None:
    read_rows(raw, "parquet")


def read_rows(raw: bytes, format: RecordFormat) -> None:  # noqa: A002 - what it is called everywhere
    table = decode_records(raw, format=format)
    read_frame(raw, format=format)
    decode_batch(raw, 0, format=format)
    with suppress(OverflowError, ValueError):  # A moment or a duration that Python has no object for.
        table.to_pylist()


def read_deletions(raw: bytes) -> None:
    deletions = Deletions([decode_deletions(raw, where="here")])
    for uid in deletions.uids:
        rows, spans = deletions.rows(uid), deletions.spans(uid)
        assert (np.diff(rows) > 0).all()
        assert (rows >= 0).all()
        assert (np.diff(spans.reshape(-1)) > 0).all()
    assert deletions.documents >= 0
    assert deletions.tokens >= 0


def read_parity(raw: bytes) -> None:
    for group in decode_groups(pa.py_buffer(raw), where="here"):
        files: list[Group | Member] = [group, *group.members]
        assert all(isinstance(file.path, str) and file.size_bytes >= 0 for file in files)
        assert all(len(file.digest) == 16 for file in files)
        assert isinstance(group.block_digests, bytes)


def parity() -> list[bytes]:
    def group(files: int) -> Group:
        members = tuple(Member(f"shards/{file:032x}.arrow", 1000 + file, bytes(16)) for file in range(files))
        return Group(f"parity/{files}", 1000 + files, bytes(16), bytes(16 * files), members)

    return [encode_groups([group(files) for files in range(1, most)]) for most in (2, 12)]


def shards() -> list[bytes]:
    storage = MemoryStorage("decoder-program")
    made = [make_shard(storage, f"{index:032x}", lengths=[3, 4]) for index in range(40)]
    return [encode_segment(segment_of(made[:count])) for count in (1, 5, 40)]


def tokens() -> list[bytes]:
    values = np.arange(1000) % 251
    offsets = np.array([0, 10, 10, 400, 1000])
    columns: dict[str, npt.NDArray[Any]] = {
        "mask": (values % 2).astype(np.uint8),
        "logits": np.ones((1000, 3), np.float16),
    }
    return [
        encode_tokens(values.astype(np.uint16), offsets).data,
        encode_tokens(values.astype(np.uint32), offsets, columns=columns).data,
    ]


def records(format: RecordFormat) -> list[bytes]:  # noqa: A002
    small = pa.table({"text": ["ein", None, "drei"], "labels": [["a", "b"], [], None], "image": [b"\0", b"", None]})
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    chats = pa.table(
        {
            "messages": pa.array([[{"role": "user", "content": "x" * n}] for n in range(50)], pa.list_(turn)),
            "vector": pa.array([[float(n)] * 4 for n in range(50)], pa.list_(pa.float32(), 4)),
            "kind": pa.array(["a", "b"] * 25).dictionary_encode(),
            "flag": pa.array([True, None] * 25),
            "when": pa.array(range(50), pa.timestamp("us")),
        }
    )
    tables = [small, chats]
    return [bytes(encode_records(table, format=format, batch_bytes=400).data) for table in tables]


def deletions() -> list[bytes]:
    rows = {f"{index:032x}": np.arange(index, 3 * index, 2, dtype=np.int32) for index in range(1, 9)}
    return [encode_deletions(rows, lengths=dict.fromkeys(rows, np.full(40, 5))), encode_deletions(rows)]


DECODERS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "segment": (read_segment, shards),
    "tokens": (read_tokens, tokens),
    "documents": (read_documents, lambda: [encode_documents(documents_of("0" * 32, [n] * n)) for n in (3, 90)]),
    "records in Arrow": (read_arrow, lambda: records("arrow")),
    "records in Parquet": (read_parquet, lambda: records("parquet")),
    "deletions": (read_deletions, deletions),
    "parity": (read_parity, parity),
}

HOSTILE = (0, 1, 2, 7, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**40, 2**62)


def flip_bit(out: bytearray, place: int, _samples: list[bytes], random_: random.Random) -> None:
    if place < len(out):
        out[place] ^= 1 << random_.randrange(8)


def write_number(out: bytearray, place: int, _samples: list[bytes], random_: random.Random) -> None:
    width = random_.choice((1, 2, 4, 8))
    start = place // width * width
    number = (random_.choice(HOSTILE) + random_.choice((0, 0, 1, -1))) % 256**width
    out[start : start + width] = number.to_bytes(width, "little")


def move_number(out: bytearray, place: int, _samples: list[bytes], random_: random.Random) -> None:
    """Change a number of the file by a little: lengths and offsets that are nearly right."""
    start = min(place, max(0, len(out) - 4)) // 4 * 4
    if start + 4 <= len(out):
        number = int.from_bytes(out[start : start + 4], "little")
        out[start : start + 4] = ((number + random_.randrange(-9, 10)) % 2**32).to_bytes(4, "little")


def cut_end(out: bytearray, place: int, _samples: list[bytes], _random: random.Random) -> None:
    del out[place:]


def cut_out(out: bytearray, place: int, _samples: list[bytes], random_: random.Random) -> None:
    del out[place : place + random_.choice((1, 4, 8, 64, 300))]


def splice(out: bytearray, place: int, samples: list[bytes], random_: random.Random) -> None:
    donor = random_.choice(samples)
    start = random_.randrange(len(donor))
    piece = donor[start : start + random_.choice((4, 8, 64, 300, 2000))]
    out[place : place + (len(piece) if random_.random() < 0.5 else 0)] = piece


def blank(out: bytearray, place: int, _samples: list[bytes], random_: random.Random) -> None:
    width = min(random_.choice((8, 64, 300)), len(out) - place)
    out[place : place + width] = bytes(width)


CHANGES = (flip_bit, write_number, move_number, cut_end, cut_out, splice, blank)


def damaged(samples: list[bytes], random_: random.Random) -> bytes:
    """Return one of `samples` after one to four changes."""
    out = bytearray(random_.choice(samples))
    for _ in range(random_.choice((1, 1, 1, 2, 3, 4))):
        # Most of what can be wrong with an Arrow or Parquet file is said at its end.
        far = min(len(out), 600) if random_.random() < 0.3 else len(out)
        random_.choice(CHANGES)(out, len(out) - random_.randrange(far + 1), samples, random_)
    return bytes(out)


def input_of(name: str, seed: int, number: int) -> bytes:
    """Return input `number` of a run, for whoever wants to look at it."""
    samples = DECODERS[name][1]()
    return damaged(samples, random.Random(f"{name}/{seed}/{number}"))


def main(name: str, seed: int, count: int) -> None:
    read, make = DECODERS[name]
    samples = make()
    for sample in samples:
        read(sample)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    accepted, most = 0, resident() + SMALL_BYTES
    for number in range(count):
        raw = damaged(samples, random.Random(f"{name}/{seed}/{number}"))
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        signal.alarm(LIMIT_S)
        try:
            read(raw)
            accepted += 1
        except CorruptError:
            pass
        signal.alarm(0)
        assert resident() <= most, f"{resident() - most + SMALL_BYTES} bytes for {len(raw)}"
    sys.stdout.write(f"done: {accepted} of {count} could be read\n")


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        sys.stdout.write("".join(f"{name}\n" for name in DECODERS))
        sys.exit()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

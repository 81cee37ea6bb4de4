"""The blocks of a stored file, each checked against its digest without trusting any other."""

from dataclasses import dataclass
from itertools import pairwise

from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import MissingError, StorageError
from datastore.storage.base import Storage

__all__ = ["BadBlock", "check_blocks"]


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A stretch of a file that is not what was written."""

    path: str
    block: int | None
    """Its number; None if the file as a whole is meant."""

    reason: str


def check_blocks(
    storage: Storage, path: str, *, size_bytes: int, block_bytes: int, digests: bytes, buffer: bytearray
) -> list[BadBlock]:
    """Return the blocks of `path` that are missing, unreadable or wrong; read through `buffer`, of one block at least."""
    if len(digests) != DIGEST_BYTES * -(-size_bytes // block_bytes):
        return [BadBlock(path, None, "its digests do not match its size")]
    bad = []
    try:
        found_bytes = storage.stat(path).size_bytes
    except MissingError:
        return [BadBlock(path, None, "the file is missing")]
    except StorageError as error:
        return [BadBlock(path, None, error.fact)]
    if found_bytes != size_bytes:
        bad.append(BadBlock(path, None, f"the file has {found_bytes} bytes, not {size_bytes}"))
    edges = [*range(0, size_bytes, block_bytes), size_bytes]
    for block, (start, stop) in enumerate(pairwise(edges)):
        target = memoryview(buffer)[: stop - start]
        try:
            storage.read_into(path, start, target)
        except (MissingError, StorageError) as error:
            bad.append(BadBlock(path, block, error.fact))
            continue
        if digest_bytes(target) != digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            bad.append(BadBlock(path, block, "the bytes do not match their digest"))
    return bad

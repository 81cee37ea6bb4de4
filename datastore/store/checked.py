"""Files that a manifest names by size and digest: nothing of them is handed out unchecked."""

import pyarrow as pa

from datastore.digest import check_digest
from datastore.errors import CorruptError
from datastore.storage.base import Storage

__all__ = ["read_checked"]


def read_checked(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> pa.Buffer:
    """Return all bytes of `key`, mapped where the file is on this machine.

    Raises:
        MissingError: there is no such key.
        CorruptError: its size or its digest differs.
    """
    path = storage.local_path(key)
    found_bytes = storage.stat(key).size_bytes
    if found_bytes == size_bytes:
        if path is None or not size_bytes:
            raw = pa.py_buffer(storage.get(key))
        else:
            with pa.memory_map(str(path)) as file:
                raw = file.read_buffer()
        found_bytes = raw.size
    if found_bytes != size_bytes:
        raise CorruptError(
            "file has another size than its manifest says",
            where=key,
            expected=size_bytes,
            found=found_bytes,
            hint="Restore this file from a copy.",
        )
    check_digest(raw, digest, where=key)
    return raw

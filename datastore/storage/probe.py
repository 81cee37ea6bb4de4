"""Ask a backend whether its put-if-absent is real: some gateways take the header and ignore it.

Asked once, when a dataset is created; the answer is recorded there. It costs three requests.
"""

import uuid

from datastore.errors import ConflictError
from datastore.storage.base import Storage

__all__ = ["probe_exclusive"]


def probe_exclusive(storage: Storage) -> bool:
    """Return whether `storage` refuses the second of two `put_new` of one key; leave nothing behind.

    Raises:
        StorageError: the probe object cannot be written.
    """
    key = f"probe-{uuid.uuid4().hex}"
    storage.put_new(key, b"first")
    try:
        storage.put_new(key, b"second")
    except ConflictError:
        return storage.exclusive and storage.get(key) == b"first"
    else:
        return False
    finally:
        storage.delete(key)

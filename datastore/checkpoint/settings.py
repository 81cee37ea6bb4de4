"""How checkpoints are kept and how long ranks wait for one another."""

from typing import Annotated

import msgspec

from datastore.document import Document

__all__ = ["CheckpointOptions", "Keep"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Keep(Document, frozen=True, kw_only=True):
    """Which steps survive: the newest `last` that can be read. Older ones go once a newer one is committed."""

    last: Positive = 3
    """Restorable steps to keep. A damaged step does not count, so there is always something to fall back to."""


class CheckpointOptions(Document, frozen=True, kw_only=True):
    """How long to wait and how many threads to use; the defaults suit a training run."""

    wait_s: Seconds = 600.0
    """How long a rank waits for the part or the commit of another one before it gives up and names it."""

    threads: Positive = 2
    """Threads that copy, hash and read; hashing reaches 25 GB/s on one, so more help only where disks are faster."""

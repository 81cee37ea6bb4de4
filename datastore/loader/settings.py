"""What a user may choose about loading; none of it changes a sample that a saved state has already fixed."""

from typing import Annotated

import msgspec

from datastore.document import Document, convert

__all__ = ["LoaderOptions", "checked_options"]

Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class LoaderOptions(Document, frozen=True, kw_only=True):
    """How a `Loader` reads. `lanes`, `window` and `epochs` shape the order, the others only the speed."""

    lanes: Lanes = 4096
    """Places of the dataset that a batch draws from, at most; fewer on a small one (`lanes_for`)."""

    window: Lanes = 256
    """Samples of a lane that are shuffled among themselves."""

    epochs: Positive | None = None
    """How often to go through the dataset; None never ends."""

    memory_bytes: Positive = 2**30
    """Memory for blocks of shards that are not on this machine. Local shards are mapped and need none."""

    prefetch_batches: Count = 16
    """How far ahead blocks are fetched and checked."""

    threads: Count = 8
    """Threads that do it, mostly by waiting for the storage; 0 fetches when a block is needed."""


def checked_options(options: LoaderOptions) -> LoaderOptions:
    """Return `options`, if all values are in range.

    Raises:
        ConfigError: one is not, and is named.
    """
    return convert(LoaderOptions, msgspec.structs.asdict(options), where="LoaderOptions")

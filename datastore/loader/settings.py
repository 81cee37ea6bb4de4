"""What a user may choose about loading; none of it changes a sample that a saved state has already fixed."""

from typing import Annotated, Literal

import msgspec

from datastore.document import Document, convert

__all__ = ["LOSS_MASK", "DeletionMode", "LoaderOptions", "checked_options"]

Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
DeletionMode = Literal["mask", "compact"]

LOSS_MASK = "loss_mask"
"""The column that says of each token whether it is to be learned: 1, or 0."""


class LoaderOptions(Document, frozen=True, kw_only=True):
    """How a `Loader` reads. `lanes`, `window`, `epochs` and `deletions` shape the order, the last ones only the speed."""

    lanes: Lanes = 4096
    """Places of the dataset that a batch draws from, at most; fewer on a small one (`lanes_for`)."""

    window: Lanes = 256
    """Samples of a lane that are shuffled among themselves."""

    epochs: Positive | None = None
    """How often to go through the dataset; None never ends."""

    deletions: DeletionMode = "mask"
    """What becomes of deleted documents. "mask": their tokens read as end-of-text, and the loss mask is 0 there; every
    sample stays where it is, so a run may go on after a delete. "compact": they are left out, as if they had never been
    there; a run then stays with the version that it began with."""

    end_of_text: Count | None = None
    """Id that deleted tokens read as; None: that of the dataset's tokenizer."""

    columns: tuple[str, ...] = ()
    """Columns beside the tokens that batches bring along; `loss_mask` always is among them if the dataset has it."""

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

"""Where a loader stands: under 1 KB, the same on every rank, and it loads on any number of ranks and any batch size.

It names the dataset version and everything the order depends on, so a state that means another order is refused, key
by key. Neither world nor batch size is in it: the cursor counts samples over all ranks.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from datastore.digest import digest_hex
from datastore.document import Document
from datastore.errors import ResumeError
from datastore.store.segment import Segments

__all__ = ["LoaderState", "dataset_fingerprint", "read_state"]

Count = Annotated[int, msgspec.Meta(ge=0)]
Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]

_MAY_DIFFER = {"cursor", "lanes", "window"}
"""Keys that a state brings along, rather than having to match."""


class LoaderState(Document, frozen=True, kw_only=True):
    """A position in the order of samples, and the order that it is a position of."""

    dataset: str
    """uuid of the dataset."""

    version: int
    fingerprint: str
    """Of the uid and length of every shard: the data itself, whatever it is called."""

    seq_len: int
    seed: int
    lanes: Lanes
    window: Lanes
    order: int
    """`ORDER_VERSION` that gave the position its meaning."""

    cursor: Count
    """Samples delivered so far, over all ranks and epochs; not those prefetched."""


def dataset_fingerprint(segments: Segments) -> str:
    """Return 16 hex digits that name the shards of a version, in order."""
    return digest_hex(segments.uid64.tobytes(), segments.tokens.tobytes())[:16]


def read_state(saved: Mapping[str, Any], *, here: LoaderState) -> LoaderState:
    """Return `saved` as a state, if it is one of the order of `here`. Lanes and window are taken from it.

    Raises:
        ResumeError: it is no such state; the message names the keys that differ.
    """
    try:
        state = msgspec.convert(dict(saved), type=LoaderState)
    except msgspec.ValidationError as error:
        raise ResumeError(f"not the state of a loader: {error}", hint="Load what `state_dict` returned.") from None
    differing = [
        name
        for name in LoaderState.__struct_fields__
        if name not in _MAY_DIFFER and getattr(state, name) != getattr(here, name)
    ]
    if differing:
        values = {f"{name}": f"saved {getattr(state, name)}, here {getattr(here, name)}" for name in differing}
        raise ResumeError(
            f"the saved state belongs to another order of samples: {', '.join(differing)} differ",
            hint="Open the same dataset version with the same seed and seq_len, or start a new run.",
            **values,
        )
    return state

"""Where a loader stands: under 1 KB, the same on every rank, and it loads on any number of ranks and any batch size.

It names the dataset version and everything the order depends on, so a state that means another order is refused, key
by key. Neither world nor batch size is in it: the cursor counts samples over all ranks.

A later version whose line of samples is the same one is no other order: where deleted tokens are masked, documents may be
deleted while a run goes on.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from datastore.dataset.shards.segments import Segments
from datastore.digest import digest_hex
from datastore.document import Count, Document
from datastore.errors import ResumeError
from datastore.loader.order.samples import Gaps
from datastore.loader.settings import DeletionMode

__all__ = ["LoaderState", "dataset_fingerprint", "read_state", "shards_fingerprint"]

Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]

_MAY_DIFFER = {"cursor", "lanes", "window", "version"}
"""Keys that a state brings along, rather than having to match."""


class LoaderState(Document, frozen=True, kw_only=True):
    """A position in the order of samples, and the order that it is a position of."""

    dataset: str
    """uuid of the dataset."""

    version: int
    fingerprint: str
    """Of the uid and length of every shard, and of what is left out of them: the line that samples are cut from."""

    seq_len: int
    seed: int
    lanes: Lanes
    window: Lanes
    order: int
    """`ORDER_VERSION` that gave the position its meaning."""

    cursor: Count
    """Samples delivered so far, over all ranks and epochs; not those prefetched."""

    deletions: DeletionMode = "mask"
    shuffle: bool = True


def dataset_fingerprint(segments: Segments, *, gaps: Gaps | None = None) -> str:
    """Return 16 hex digits that name the shards of a version, in order, and what is left out of them."""
    parts = [segments.uid64, segments.tokens] + ([gaps.start, gaps.stop] if gaps is not None else [])
    return digest_hex(*(part.tobytes() for part in parts))[:16]


def shards_fingerprint(segments: Segments, *, shards: int) -> str:
    """Return 16 hex digits that name the first `shards` shards of a version, in order."""
    return digest_hex(segments.uid64[:shards].tobytes(), segments.tokens[:shards].tobytes())[:16]


def read_state(saved: Mapping[str, Any], *, here: LoaderState) -> LoaderState:
    """Return `saved` as a state of the version of `here`, if it is one of its order. Lanes and window are taken from it.

    A later version of the same line will do; an earlier one not: what was deleted does not come back into a run.

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
    if state.version != here.version and (state.version > here.version or "fingerprint" in differing):
        differing.insert(0, "version")
    if differing:
        values = {f"{name}": f"saved {getattr(state, name)}, here {getattr(here, name)}" for name in differing}
        raise ResumeError(
            f"the saved state belongs to another order of samples: {', '.join(differing)} differ",
            hint=_way_out(state, differing),
            **values,
        )
    return msgspec.structs.replace(state, version=here.version)


def _way_out(state: LoaderState, differing: list[str]) -> str:
    if "version" not in differing or "dataset" in differing:
        return "Open the same dataset version with the same seed, seq_len and deletions, or start a new run."
    if state.deletions == "compact":
        return (
            f"Open version {state.version}: a run that leaves out deleted documents stays with it. Or start a new run."
        )
    return f"Open version {state.version}, or a later one that has the same shards; or start a new run."

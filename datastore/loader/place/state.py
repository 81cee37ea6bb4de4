"""Where a loader stands: under 1 KB, the same on every rank, and it loads on any number of ranks and any batch size.

A mixture adds some 200 bytes for each of its sources.

It names the dataset version and everything the order depends on, so a state that means another order is refused, key
by key. Neither world nor batch size is in it: the cursor counts samples over all ranks.

A later version whose line of samples is the same one is no other order: where deleted tokens are masked, documents may be
deleted while a run goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from datastore.dataset.shards.segments import Segments
from datastore.digest import digest_hex
from datastore.document import Count, Document
from datastore.errors import ResumeError
from datastore.loader.order.samples import Gaps
from datastore.loader.settings import DeletionMode, Packing

__all__ = [
    "LoaderState",
    "SourceState",
    "StageState",
    "as_values",
    "dataset_fingerprint",
    "is_same_mixture",
    "read_state",
    "shards_fingerprint",
]

Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]

_MAY_DIFFER = {"cursor", "lanes", "window", "version", "sources", "stages", "given"}
"""Keys that a state brings along, rather than having to match; or that are compared one by one."""


_SELDOM = {"packing", "sources", "stages", "given"}
"""Keys that are left out where they have nothing to say."""


class SourceState(Document, frozen=True, kw_only=True):
    """A source of a mixture."""

    dataset: str
    """uuid of the dataset."""

    version: int
    fingerprint: str
    samples: Count
    lanes: Lanes
    window: Lanes
    epochs: float | None = None
    """How often it is gone through at most."""


class StageState(Document, frozen=True, kw_only=True):
    """Weights from a position on."""

    start: Count
    weights: Mapping[str, float]
    drawn: Mapping[str, int] = msgspec.field(default_factory=dict)
    """How many samples of each source came before; only of the first stage, where weights were changed."""


class LoaderState(Document, frozen=True, kw_only=True):
    """A position in the order of samples, and the order that it is a position of."""

    dataset: str
    """uuid of the dataset; "mixture" of a mixture, whose version and fingerprint are those of its sources."""

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
    packing: Packing | None = None
    sources: Mapping[str, SourceState] = msgspec.field(default_factory=dict)
    """Of a mixture, by name."""

    stages: tuple[StageState, ...] = ()
    """Of a mixture: the weights in force, and those to come."""

    given: tuple[StageState, ...] = ()
    """The stages that the program gave, where they are others: weights were changed since."""


def dataset_fingerprint(segments: Segments, *, gaps: Gaps | None = None) -> str:
    """Return 16 hex digits that name the shards of a version, in order, and what is left out of them."""
    parts = [segments.uid64, segments.tokens] + ([gaps.start, gaps.stop] if gaps is not None else [])
    return digest_hex(*(part.tobytes() for part in parts))[:16]


def shards_fingerprint(segments: Segments, *, shards: int) -> str:
    """Return 16 hex digits that name the first `shards` shards of a version, in order."""
    return digest_hex(segments.uid64[:shards].tobytes(), segments.tokens[:shards].tobytes())[:16]


def as_values(state: LoaderState) -> dict[str, Any]:
    """Return `state` as JSON values, without what has nothing to say."""
    values: dict[str, Any] = msgspec.to_builtins(state)
    return {name: value for name, value in values.items() if value or name not in _SELDOM}


def read_state(saved: Mapping[str, Any], *, here: LoaderState, reweigh: bool = False) -> LoaderState:
    """Return `saved` as a state of the version of `here`, if it is one of its order. Lanes and window are taken from it.

    A later version of the same line will do; an earlier one not: what was deleted does not come back into a run. With `reweigh`
    the weights, stages and epochs of a mixture are those of `saved` still, but may differ from those of `here`, and so may its sources.

    Raises:
        ResumeError: it is no such state; the message names the keys that differ.
    """
    try:
        state = msgspec.convert(dict(saved), type=LoaderState)
    except msgspec.ValidationError as error:
        raise ResumeError(f"not the state of a loader: {error}", hint="Load what `state_dict` returned.") from None
    names = [name for name in LoaderState.__struct_fields__ if name not in _MAY_DIFFER]
    differing = _differing(state, here, names)
    if _is_other_version(state, here, differing):
        differing = {"version": f"saved {state.version}, here {here.version}", **differing}
    differing.update(_differing_sources(state, here, reweigh=reweigh))
    if not reweigh and not differing and (state.given or state.stages) != here.stages:
        raise ResumeError(
            "the mixture has other weights than the one that the state was saved by",
            saved=_shown(state.given or state.stages),
            here=_shown(here.stages),
            hint="Load it with the same weights; or go on with other ones from here on: `load_state_dict(state, reweigh=True)`.",
        )
    if differing:
        raise ResumeError(
            f"the saved state belongs to another order of samples: {', '.join(differing)} differ",
            hint=_way_out(state, list(differing)),
            **differing,
        )
    sources = {
        name: msgspec.structs.replace(source, version=here.sources[name].version) if name in here.sources else source
        for name, source in state.sources.items()
    }
    return msgspec.structs.replace(state, version=here.version, sources=sources)


def is_same_mixture(saved: LoaderState, here: LoaderState) -> bool:
    """Return whether a program that had the mixture of `here` saved `saved`, though it may have changed the weights since."""
    shapes = [
        {name: (source.dataset, source.fingerprint, source.epochs) for name, source in state.sources.items()}
        for state in (saved, here)
    ]
    return shapes[0] == shapes[1] and (saved.given or saved.stages) == here.stages


def _differing(saved: Document, here: Document, names: Sequence[str]) -> dict[str, str]:
    """Return which of the fields `names` differ, and how."""
    pairs = {name: (getattr(saved, name), getattr(here, name)) for name in names}
    return {name: f"saved {then}, here {now}" for name, (then, now) in pairs.items() if then != now}


def _is_other_version(
    saved: "LoaderState | SourceState", here: "LoaderState | SourceState", differing: Mapping[str, str]
) -> bool:
    """Return whether `here` is not of a later version of the same line."""
    return saved.version != here.version and (saved.version > here.version or "fingerprint" in differing)


def _differing_sources(state: LoaderState, here: LoaderState, *, reweigh: bool) -> dict[str, str]:
    """Return which sources of a mixture are not the same ones."""
    found: dict[str, str] = {}
    for name in sorted({*state.sources, *here.sources}):
        then, now = state.sources.get(name), here.sources.get(name)
        if then is None or now is None:
            if not reweigh:
                found[f"sources.{name}"] = f"saved {'without' if then is None else 'with'} it"
            continue
        keys = _differing(then, now, ["dataset", "fingerprint", *([] if reweigh else ["epochs"])])
        if _is_other_version(then, now, keys):
            keys["version"] = f"saved {then.version}, here {now.version}"
        found |= {f"sources.{name}.{key}": value for key, value in keys.items()}
    return found


def _shown(stages: Sequence[StageState]) -> str:
    return "; ".join(
        f"from {stage.start}: " + ", ".join(f"{name} {weight:.6g}" for name, weight in stage.weights.items())
        for stage in stages
    )


def _way_out(state: LoaderState, differing: list[str]) -> str:
    if any(key.startswith("sources.") for key in differing):
        return (
            "Open the same datasets at the same versions; to add or drop one, `load_state_dict(state, reweigh=True)`."
        )
    if "version" not in differing or "dataset" in differing:
        return "Open the same dataset version with the same seed, seq_len and deletions, or start a new run."
    if state.deletions == "compact":
        return (
            f"Open version {state.version}: a run that leaves out deleted documents stays with it. Or start a new run."
        )
    return f"Open version {state.version}, or a later one that has the same shards; or start a new run."

"""The settings of a loader, none of which changes a sample that a saved state has already fixed, and the rank that it has.

`rank` is the index among processes that read *different* data. Peers of tensor, pipeline or context parallelism read
the same, so they share a rank here: it comes from the device mesh (`datastore.torch.rank_of`), never from RANK.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from datastore.document import Count, Positive, SettingsDocument, convert
from datastore.errors import ConfigError, whole_number

__all__ = ["LOSS_MASK", "DeletionMode", "LoaderSettings", "Packing", "Rank", "checked_options", "checked_seed"]

Lanes = Annotated[int, msgspec.Meta(ge=1, le=65_536)]

DeletionMode = Literal["mask", "compact"]

LOSS_MASK = "loss_mask"
"""The column that says of each token whether it is to be learned: 1, or 0."""


Packing = Literal["best_fit", "buckets"]


class LoaderSettings(SettingsDocument, frozen=True, kw_only=True):
    """How a `Loader` reads. `shuffle`, `lanes`, `window`, `epochs` and `deletions` shape the order, the last ones only the speed."""

    shuffle: bool = True
    """Whether samples are shuffled, anew in each epoch; false: they come in the order of the dataset, as for an evaluation."""

    lanes: Lanes = 4096
    """Places of the dataset that a batch draws from, at most; fewer on a small one (`lanes_for`)."""

    window: Lanes = 256
    """Samples of a lane that are shuffled among themselves."""

    epochs: Positive | None = None
    """How often to go through the dataset; None never ends."""

    packing: Packing | None = None
    """Of which tokens a sample is made. None: of the stream as it is, cut every `seq_len` tokens. "best_fit": of whole
    documents, packed so that none is cut that fits a row, with little padding. The loss mask is 0 at their first tokens and in
    the padding; `Batch.document_starts` tells them apart. "buckets": of documents of similar length, as many as fit if each takes up
    as much as the longest: `Batch.sequences` are then rectangles of at most `seq_len + 1` tokens, for models that do not know
    packing. Both read the lengths of all documents first."""

    deletions: DeletionMode = "mask"
    """What becomes of deleted documents. "mask": their tokens read as end-of-text, and the loss mask is 0 there; every
    sample stays where it is, so a run may go on after a delete. "compact": they are left out, as if they had never been
    there; a run then stays with the version that it began with."""

    end_of_text: Count | None = None
    """Id that deleted tokens read as; None: that of the dataset's tokenizer."""

    columns: tuple[str, ...] = ()
    """Columns beside the tokens that batches bring along; `loss_mask` always is among them if the dataset has it."""

    memory_bytes: Positive = 2**30
    """Memory for blocks of shards that are not on this machine. Local shards are read where they lie and need none."""

    cache_dir: str = ""
    """A folder of a local disk that keeps blocks of shards which are not on this machine, for all ranks and runs of it, and for
    the next start. Empty: none. Who runs a job on a machine sets it: it changes no sample, and may be another one each time."""

    cache_bytes: Positive = 2**36
    """How much the blocks in `cache_dir` may take, those of other runs with them; let all that share it say the same."""

    timeout_s: Positive = 300
    """How long a batch waits for one block, or for its rows to be made, before that is an error; `next` may be called again. Longer
    than a storage repeats a request, some 180 seconds."""

    prefetch_batches: Count = 16
    """How far ahead blocks are fetched and checked."""

    threads: Count = 8
    """Threads that do it, mostly by waiting for the storage; 0 fetches when a block is needed."""


def checked_options(options: LoaderSettings) -> LoaderSettings:
    """Return `options`, if all values are in range.

    Raises:
        ConfigError: one is not, and is named.
    """
    return convert(LoaderSettings, msgspec.structs.asdict(options), where="LoaderSettings")


def checked_seed(seed: int) -> int:
    """Return `seed`, if it is in range.

    Raises:
        ConfigError: it is not.
    """
    number = whole_number(seed, name="seed")
    if not 0 <= number < 2**63:
        raise ConfigError("seed out of range", seed=number, hint="Use a number from 0 to 2^63 - 1.")
    return number


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `world` readers.

    Raises:
        ConfigError: `world` is below 1, or `rank` is not in `[0, world)`.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole_number(self.rank, name="rank"))
        object.__setattr__(self, "world", whole_number(self.world, name="world"))
        if self.world < 1:
            raise ConfigError("world must be at least 1", world=self.world, hint="Count the processes that read.")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                "rank is not below world", rank=self.rank, world=self.world, hint="Ranks count from 0 to world - 1."
            )

    def share(self, slots: int) -> tuple[int, int]:
        """Return the slots `[start, stop)` out of `slots` that are this reader's; sizes differ by at most one."""
        return self.rank * slots // self.world, (self.rank + 1) * slots // self.world

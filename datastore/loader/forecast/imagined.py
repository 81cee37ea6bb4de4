"""A dataset that is not there: so many shards of so many tokens, as the planning of a loader sees them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.errors import ConfigError

__all__ = ["ImaginedDataset", "ImaginedSegments"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImaginedSegments:
    """Shards of equal size."""

    shards: int
    shard_tokens: int
    token_bytes: int = 2

    def __len__(self) -> int:
        return self.shards

    @property
    def tokens(self) -> I64:
        """Tokens of each shard."""
        return np.full(self.shards, self.shard_tokens)

    @property
    def itemsize(self) -> I64:
        """Bytes of a token of each shard."""
        return np.full(self.shards, self.token_bytes)

    @property
    def values_start(self) -> I64:
        """Where the tokens of each shard start."""
        return np.zeros(self.shards, np.int64)

    @property
    def size_bytes(self) -> I64:
        """Size of each shard's file."""
        return self.tokens * self.token_bytes

    @property
    def block_bytes(self) -> I64:
        """Bytes of a block of each shard."""
        return np.full(self.shards, BLOCK_BYTES)

    @property
    def uid64(self) -> npt.NDArray[np.uint64]:
        """A name for each shard."""
        return np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, self.shards).astype(np.uint64)


@dataclass(frozen=True)
class ImaginedDataset:
    """What the order of samples depends on."""

    segments: ImaginedSegments
    uuid: str = ""
    version: int = 1

    @staticmethod
    def of(tokens: int, *, shard_bytes: int, token_bytes: int = 2) -> "ImaginedDataset":
        """Return a dataset of about `tokens` tokens in shards of about `shard_bytes`.

        Raises:
            ConfigError: there is not even one token in a shard.
        """
        if tokens < 1 or shard_bytes < token_bytes:
            raise ConfigError("a dataset has tokens", tokens=tokens, shard_bytes=shard_bytes, hint="Give more of both.")
        shards = max(1, round(tokens * token_bytes / shard_bytes))
        return ImaginedDataset(ImaginedSegments(shards, tokens // shards, token_bytes))

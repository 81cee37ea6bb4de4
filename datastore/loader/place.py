"""Where a process stands among those that read together.

`rank` is the index among processes that read *different* data. Peers of tensor, pipeline or context parallelism read
the same, so they share a rank here: it comes from the device mesh (`datastore.torch.place_of`), never from RANK.
"""

from dataclasses import dataclass

from datastore.errors import ConfigError

__all__ = ["Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """One of `world` readers.

    Raises:
        ConfigError: `world` is below 1, or `rank` is not in `[0, world)`.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ConfigError("world must be at least 1", world=self.world, hint="Count the processes that read.")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                "rank is not below world", rank=self.rank, world=self.world, hint="Ranks count from 0 to world - 1."
            )

    def share(self, slots: int) -> tuple[int, int]:
        """Return the slots `[start, stop)` out of `slots` that are this reader's; sizes differ by at most one."""
        return self.rank * slots // self.world, (self.rank + 1) * slots // self.world

"""The strategy of a layout, chosen once."""

from datastore.training.parallel.layout import Layout
from datastore.training.parallel.pipeline import Pipeline
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.rounds import Rounds
from datastore.training.parallel.servers import Servers
from datastore.training.parallel.sharded import Sharded
from datastore.training.parallel.strategy import Strategy
from datastore.training.parallel.whole import Whole
from datastore.training.settings import SyncSettings

__all__ = ["choose", "differs"]

_PLAIN = SyncSettings()

_KINDS: dict[str, type[Whole]] = {"parameter_server": Servers, "diloco": Rounds}


def choose(layout: Layout, ranks: Ranks, sync: SyncSettings = _PLAIN) -> Strategy:
    """Return how `ranks` share the work, and bring together what they learn."""
    if layout.pipeline > 1:
        return Pipeline(layout, ranks)
    if layout.splits:
        return Sharded(layout, ranks, sync)
    return _KINDS.get(sync.use, Whole)(layout, ranks, sync)


def differs(sync: SyncSettings) -> bool:
    """Return whether ranks that bring gradients together like this have other weights, or other moments, between steps."""
    return _KINDS.get(sync.use, Whole).differs

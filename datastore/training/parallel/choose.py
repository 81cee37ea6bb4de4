"""The strategy of a layout, chosen once."""

from datastore.training.parallel.layout import Layout
from datastore.training.parallel.pipeline import Pipeline
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.sharded import Sharded
from datastore.training.parallel.strategy import Strategy
from datastore.training.parallel.whole import Whole

__all__ = ["choose"]


def choose(layout: Layout, ranks: Ranks) -> Strategy:
    """Return how `ranks` share the work."""
    if layout.pipeline > 1:
        return Pipeline(layout, ranks)
    return Sharded(layout, ranks) if layout.splits else Whole(layout, ranks)

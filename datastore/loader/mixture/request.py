"""The request: datasets by name, how much of each, from when on, and how often.

Weights are shares of the samples, not of documents or bytes. They need not add up to 1.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError

__all__ = ["Data", "Mixture", "Readable", "Stage", "Weights", "weights_in_force"]

Weights = Mapping[str, float]
"""How much of each source, by name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Readable(Protocol):
    """A dataset, or files that were not ingested."""

    @property
    def kind(self) -> str:
        """`tokens` or `records`."""
        ...

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """Weights that hold from a position on, until the next stage."""

    start: int
    """Samples that all ranks have been given before it."""

    weights: Weights
    """Of each source: its share is that over the sum of all."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Several datasets to be read as one: what `Loader` and `RowLoader` take in place of a dataset.

    Every source has an order of its own, in which each of its samples comes once before any comes again. At every
    position the draws of a source are within 2 samples of its share of them, for any number of sources; a period that is
    short of a source's share is made up for at once, not on average.

    Of the same sources, weights and seed, every rank plans the same mixture by itself, from any position at once.

    Raises:
        ConfigError: there is no source, a name is no plain one, or a value is out of range; the message names it.
    """

    sources: Mapping[str, Readable]
    """Datasets of tokens; or of records, or files that were not ingested. Several versions of one are several sources."""

    weights: Weights | None = None
    """How much of each source; one that is not named, or has 0, is left out. None: as many samples as each has, times its `epochs`."""

    temperature: float = 1.0
    """Raise weights to the power of 1 / temperature: above 1 small sources gain, towards equal shares."""

    epochs: Mapping[str, float] = field(default_factory=dict)
    """How often to go through a source at most, where that is said; then the others share what it had. When none is left,
    the mixture ends."""

    stages: Sequence[Stage] = ()
    """Other weights from later positions on, in order: a curriculum."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("the mixture has no source", hint='Pass datasets by name: {"web": ds.open("...")}.')
        for name in self.sources:
            if not _NAME.fullmatch(name):
                raise ConfigError("not a name for a source", name=name, hint="Use letters, digits, '.', '_' and '-'.")
        kinds = {name: source.kind for name, source in self.sources.items()}
        if len(set(kinds.values())) > 1:
            raise ConfigError("a mixture is of tokens or of records", hint="Load them with two loaders.", **kinds)
        if not 0 < self.temperature < math.inf:
            raise ConfigError("temperature out of range", temperature=self.temperature, hint="Use a number above 0.")
        for name, passes in self.epochs.items():
            _check_source(name, self.sources)
            if not 0 <= passes < math.inf:
                raise ConfigError("epochs out of range", source=name, epochs=passes, hint="Use 0 or more.")
        self._check_stages()

    def _check_stages(self) -> None:
        for stage, weights in self._given():
            _check_weights(weights, self.sources, stage=stage)
        starts = [0, *(stage.start for stage in self.stages)]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ConfigError("stages are out of order", starts=starts[1:], hint="Each starts after the one before it.")

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in the order of their numbers: sorted by name, so that the order they are given in is all the same."""
        return tuple(sorted(self.sources))

    def stages_of(self, samples: Mapping[str, int]) -> list[Stage]:
        """Return all stages, the first one too, given the `samples` of each source. Weights are those of the schedule."""
        sizes = {name: samples[name] * self.epochs.get(name, 1.0) for name in self.names}
        first = Stage(0, sizes if self.weights is None else self.weights)
        power = 1 / self.temperature
        return [
            Stage(stage.start, {name: float(stage.weights.get(name, 0)) ** power for name in self.names})
            for stage in (first, *self.stages)
        ]

    def _given(self) -> list[tuple[int, Weights]]:
        first = [] if self.weights is None else [(0, self.weights)]
        return first + [(stage.start, stage.weights) for stage in self.stages]


Data = Dataset | Mixture
"""What a loader reads."""


def weights_in_force(stages: Sequence[Stage], at: int) -> Weights:
    """Return the weights that hold at position `at`."""
    return [stage.weights for stage in stages if stage.start <= at][-1]


def _check_weights(weights: Weights, sources: Mapping[str, Readable], *, stage: int) -> None:
    for name, weight in weights.items():
        _check_source(name, sources)
        if not 0 <= weight < math.inf:
            raise ConfigError("weight out of range", source=name, weight=weight, stage=stage, hint="Use 0 or more.")
    if not any(weights.values()):
        raise ConfigError("all weights are 0", stage=stage, hint="Give at least one source a weight.")


def _check_source(name: str, sources: Mapping[str, Readable]) -> None:
    if name not in sources:
        raise ConfigError(
            "the mixture has no such source", source=name, sources=sorted(sources), hint="Name one of them."
        )

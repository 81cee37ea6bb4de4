"""Parts of the data by a hash: what is trained on, what is validated and what is tested with.

Which part a document belongs to follows from its id and the seed alone. So it is the same in every ingest, whatever is added
later. Near duplicates of each other belong to one part if a table of clusters is named: then the id of the cluster's first
document decides for all of it. Each part is ingested by itself, with the same sources.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from typing_extensions import override

from datastore.digest import digest_hex
from datastore.errors import ConfigError, MissingError
from datastore.ingestion.quality.filter import Count, Filter
from datastore.ingestion.quality.text import Dropped, Text, Verdict

__all__ = ["Split", "part_of"]


class Split(Filter, frozen=True, kw_only=True, tag="split"):
    """Keeps one part of the documents."""

    part: str
    """Which one of `shares`."""

    shares: dict[Annotated[str, msgspec.Meta(min_length=1)], Annotated[float, msgspec.Meta(ge=0, le=1)]] = (
        msgspec.field(default_factory=lambda: {"train": 0.98, "validation": 0.01, "test": 0.01})
    )
    """How much of the documents each part is; together 1."""

    seed: Count = 0
    """Another one gives other parts."""

    clusters: str = ""
    """Path of a table that `datastore dedup --clusters` has written, so that near duplicates are in one part. Empty: each
    document by itself."""

    @override
    def apply(self, text: Text) -> Verdict:
        name = str(text.about["id"])
        key = _clusters(self.clusters).get(name, name) if self.clusters else name
        part = part_of(key, self.shares, seed=self.seed)
        return text if part == self.part else Dropped(f"is in {part}")

    @override
    def identity(self) -> str:
        total = sum(self.shares.values())
        if self.part not in self.shares or abs(total - 1) > 1e-9:
            raise ConfigError(
                "there is no such part" if self.part not in self.shares else "the parts are not the whole",
                part=self.part,
                shares=self.shares,
                total=total,
                hint="Give shares that are 1 together, and the name of one of them.",
            )
        if not self.clusters:
            return ""
        _clusters(self.clusters)
        return digest_hex(Path(self.clusters).read_bytes())


def part_of(key: str, shares: Mapping[str, float], *, seed: int = 0) -> str:
    """Return the part that a document, or a cluster, of that id belongs to."""
    place = xxhash.xxh3_64_intdigest(f"{seed}/{key}".encode()) / 2**64
    names = sorted(shares)
    for name in names:
        place -= shares[name]
        if place < 0:
            return name
    return max(names, key=lambda name: shares[name])  # Rounding has left a sliver.


@cache
def _clusters(path: str) -> Mapping[str, str]:
    if not Path(path).is_file():
        raise MissingError(
            "no such table of clusters", clusters=path, hint="Write it with `datastore dedup --clusters`."
        )
    try:
        table: Any = pq.read_table(path, columns=["id", "cluster"])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"not a table of clusters: {error}", clusters=path, hint="Name another file.") from None
    return dict(zip(table.column("id").to_pylist(), table.column("cluster").to_pylist(), strict=True))

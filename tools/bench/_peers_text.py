"""How each library reads shuffled rows of text, as its documentation shows it; see `tools/bench/peers-loader`.

A reader imports what it needs and returns a function that opens the data and yields how many characters each batch has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _peers_tokens import public_names
from _peers_writers import BATCH, mosaicml

__all__ = ["TEXT"]


def characters_in(batches: Any) -> Iterator[float]:
    """Yield how many characters each batch has, if it is a list of texts."""
    for batch in batches:
        assert type(batch[0]) is str
        yield float(sum(map(len, batch)))


def ours_text(folder: Path, *, arrow: bool = False) -> Callable[[], Iterator[float]]:
    ds = public_names()

    def begin() -> Iterator[float]:
        loader = ds.RowLoader(ds.open(folder / "datastore"), global_batch=BATCH, options=ds.LoaderSettings(epochs=1))
        if arrow:
            return (float(batch.data["text"].nbytes - 8 * (BATCH + 1)) for batch in loader)
        return characters_in(batch.data["text"].to_pylist() for batch in loader)

    return begin


def gather_text(folder: Path) -> Callable[[], Iterator[float]]:
    text = memoryview(np.memmap(folder / "text.bin", np.uint8, "r"))
    starts = np.fromfile(folder / "starts.bin", np.int64)
    order = np.random.default_rng(0).permutation(len(starts) - 1)

    def begin() -> Iterator[float]:
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            yield float(
                sum(
                    len(str(text[a:b], "ascii"))
                    for a, b in zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True)
                )
            )

    return begin


def mds_text(folder: Path) -> Callable[[], Iterator[float]]:
    streaming = mosaicml()
    from torch.utils.data import DataLoader

    def begin() -> Iterator[float]:
        data = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
        return characters_in(batch["text"] for batch in DataLoader(data, batch_size=BATCH))

    return begin


def litdata_text(folder: Path) -> Callable[[], Iterator[float]]:
    from litdata import StreamingDataLoader, StreamingDataset

    def begin() -> Iterator[float]:
        data = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True)
        return characters_in(StreamingDataLoader(data, batch_size=BATCH))

    return begin


def webdataset_text(folder: Path) -> Callable[[], Iterator[float]]:
    import webdataset as wds

    def begin() -> Iterator[float]:
        shards = sorted(map(str, (folder / "webdataset").glob("*.tar")))
        data = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1_000).decode().to_tuple("txt").batched(BATCH)
        return characters_in(batch[0] for batch in data)

    return begin


def grain_text(folder: Path) -> Callable[[], Iterator[float]]:
    import grain

    def begin() -> Iterator[float]:
        source = grain.sources.ArrayRecordDataSource(str(folder / "grain" / "data.array_record"))
        data = grain.MapDataset.source(source).shuffle(seed=0).map(lambda raw: raw.decode())
        return characters_in(data.batch(BATCH, batch_fn=list).to_iter_dataset())

    return begin


def hf_text(folder: Path) -> Callable[[], Iterator[float]]:
    import datasets
    from torch.utils.data import DataLoader

    def begin() -> Iterator[float]:
        data = datasets.load_from_disk(str(folder / "hf"))
        return characters_in(batch["text"] for batch in DataLoader(data, batch_size=BATCH, shuffle=True))

    return begin


def lance_text(folder: Path) -> Callable[[], Iterator[float]]:
    import lance.torch.data
    from torch.utils.data import DataLoader

    def begin() -> Iterator[float]:
        data = lance.torch.data.SafeLanceDataset(str(folder / "lance"))
        return characters_in(batch["text"] for batch in DataLoader(data, batch_size=BATCH, shuffle=True))

    return begin


TEXT: dict[str, tuple[str, str, Callable[[Path], Callable[[], Iterator[float]]]]] = {
    "datastore": ("datastore", "", ours_text),
    "datastore, as Arrow": ("datastore", "", lambda folder: ours_text(folder, arrow=True)),
    "memory map": ("flat", "", gather_text),
    "MosaicML Streaming": ("mds", "mosaicml-streaming", mds_text),
    "LitData": ("litdata", "litdata", litdata_text),
    "WebDataset": ("webdataset", "webdataset", webdataset_text),
    "Grain": ("grain", "grain", grain_text),
    "HF datasets": ("hf", "datasets", hf_text),
    "Lance": ("lance", "pylance", lance_text),
}
"""By name: the format, the package, and the reader."""

"""How each library reads shuffled samples of tokens, as its documentation shows it; see `tools/bench/peers-loader`.

A reader imports what it needs and returns a function that opens the data and yields how many tokens each batch has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _peers_writers import BATCH, SEQ, mosaicml

__all__ = ["LATER", "PARTS", "TOKENS", "public_names"]

LATER = ", second epoch"


def tokens_in(batches: Any) -> Iterator[float]:
    """Yield how many tokens each batch has, if it is what was asked for."""
    import torch

    for batch in batches:
        assert (batch.dtype, batch.shape[1]) == (torch.int64, SEQ + 1)
        yield batch.numel()


def public_names() -> Any:
    """Return `datastore` with what is used here imported, which it does at first use."""
    import datastore

    for name in ("open", "Loader", "RowLoader", "LoaderSettings"):
        getattr(datastore, name)
    return datastore


def ours(folder: Path) -> Callable[[], Iterator[float]]:
    from datastore.torch import stream

    ds = public_names()
    options = ds.LoaderSettings(epochs=1)
    kept: list[Any] = []

    def begin() -> Iterator[float]:
        if kept:
            kept[0].loader.load_state_dict(kept[1])
        else:
            loader = ds.Loader(ds.open(folder / "datastore"), seq_len=SEQ, global_batch=BATCH, options=options)
            kept.extend([stream(loader), loader.state_dict()])
        return tokens_in(batch.tokens for batch in kept[0])

    return begin


def ours_narrow(folder: Path) -> Callable[[], Iterator[float]]:
    ds = public_names()

    loader = ds.Loader(
        ds.open(folder / "datastore"), seq_len=SEQ, global_batch=BATCH, options=ds.LoaderSettings(epochs=1)
    )
    start, out = loader.state_dict(), np.empty((BATCH, SEQ + 1), np.uint16)

    def begin() -> Iterator[float]:
        loader.load_state_dict(start)
        while True:
            try:
                yield loader.next_into(out).tokens.size
            except StopIteration:
                return

    return begin


def ours_planned(folder: Path) -> Callable[[], Iterator[float]]:
    ds = public_names()

    def begin() -> Iterator[float]:
        loader = ds.Loader(
            ds.open(folder / "datastore"), seq_len=SEQ, global_batch=BATCH, options=ds.LoaderSettings(epochs=1)
        )
        while plans := loader.plan(1_024):
            loader.skip(len(plans))
            yield float(sum(len(plan) for plan in plans) * (SEQ + 1))

    return begin


def ours_digests(folder: Path) -> Callable[[], Iterator[float]]:
    from datastore.loader.cache.files import FileBlocks

    ds = public_names()

    def begin() -> Iterator[float]:
        dataset = ds.open(folder / "datastore")
        blocks = FileBlocks(dataset.storage, dataset.segments)
        for block in range(blocks.layout.blocks):
            blocks.fetch(block)
            place = blocks.layout.range_of(block)
            yield (place.stop - place.start) / 2

    return begin


def gather(folder: Path, *, widened: bool) -> Callable[[], Iterator[float]]:
    import torch

    tokens = np.memmap(folder / "tokens.bin", np.uint16, "r").view(np.ndarray)
    starts = (SEQ * np.random.default_rng(0).permutation((len(tokens) - 1) // SEQ)).tolist()
    out = np.empty((BATCH, SEQ + 1), np.uint16)

    def begin() -> Iterator[float]:
        for first in range(0, len(starts) - BATCH, BATCH):
            for row, start in enumerate(starts[first : first + BATCH]):
                out[row] = tokens[start : start + SEQ + 1]
            yield float(torch.from_numpy(out.astype(np.int64)).numel() if widened else out.size)

    return begin


def nanogpt(folder: Path) -> Callable[[], Iterator[float]]:
    import torch

    def begin() -> Iterator[float]:
        for _ in range(len(np.memmap(folder / "tokens.bin", np.uint16, "r")) // (BATCH * SEQ)):
            data = np.memmap(folder / "tokens.bin", np.uint16, "r")
            places = torch.randint(len(data) - SEQ, (BATCH,))
            inputs = torch.stack([torch.from_numpy((data[i : i + SEQ]).astype(np.int64)) for i in places])
            targets = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + SEQ]).astype(np.int64)) for i in places])
            assert inputs.shape == targets.shape
            yield float(BATCH * (SEQ + 1))

    return begin


def mds(folder: Path) -> Callable[[], Iterator[float]]:
    streaming = mosaicml()
    import torch
    from torch.utils.data import DataLoader

    class Tokens(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            return torch.from_numpy(super().__getitem__(index)["tokens"].astype(np.int64))

    def begin() -> Iterator[float]:
        data = Tokens(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
        return tokens_in(DataLoader(data, batch_size=BATCH))

    return begin


def litdata(folder: Path) -> Callable[[], Iterator[float]]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    def begin() -> Iterator[float]:
        loader = TokensLoader(block_size=SEQ + 1)
        data = StreamingDataset(str(folder / "litdata"), item_loader=loader, shuffle=True, drop_last=True)
        return tokens_in(batch.long() for batch in StreamingDataLoader(data, batch_size=BATCH))

    return begin


def webdataset(folder: Path) -> Callable[[], Iterator[float]]:
    import torch
    import webdataset as wds

    def begin() -> Iterator[float]:
        shards = sorted(map(str, (folder / "webdataset").glob("*.tar")))
        data = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1_000).decode().to_tuple("npy").batched(BATCH)
        return tokens_in(torch.from_numpy(np.stack(batch[0]).astype(np.int64)) for batch in data)

    return begin


def grain(folder: Path) -> Callable[[], Iterator[float]]:
    import grain
    import torch

    def begin() -> Iterator[float]:
        source = grain.sources.ArrayRecordDataSource(str(folder / "grain" / "data.array_record"))
        data = (
            grain.MapDataset.source(source).shuffle(seed=0).map(lambda raw: np.frombuffer(raw, np.uint16)).batch(BATCH)
        )
        return tokens_in(torch.from_numpy(batch.astype(np.int64)) for batch in data.to_iter_dataset())

    return begin


def hf(folder: Path) -> Callable[[], Iterator[float]]:
    import datasets
    from torch.utils.data import DataLoader

    def begin() -> Iterator[float]:
        data = datasets.load_from_disk(str(folder / "hf")).with_format("torch")
        return tokens_in(batch["input_ids"] for batch in DataLoader(data, batch_size=BATCH, shuffle=True))

    return begin


def lance_map(folder: Path) -> Callable[[], Iterator[float]]:
    import lance
    import torch
    from torch.utils.data import DataLoader

    class Taken(torch.utils.data.Dataset[Any]):
        """`SafeLanceDataset`, but with arrays instead of lists of Python's int, which take fifty times as long."""

        def __init__(self, uri: str) -> None:
            self.data = lance.dataset(uri)

        def __len__(self) -> int:
            return int(self.data.count_rows())

        def __getitems__(self, indices: list[int]) -> Any:
            column = self.data.take(indices)["input_ids"].combine_chunks()
            return torch.from_numpy(column.flatten().to_numpy().reshape(len(indices), -1).astype(np.int64))

    def begin() -> Iterator[float]:
        data = Taken(str(folder / "lance"))
        return tokens_in(DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=lambda batch: batch))

    return begin


PARTS = (
    "datastore",
    "datastore, planning alone",
    "datastore, digests alone",
    f"datastore{LATER}",
    f"datastore, narrow{LATER}",
)

TOKENS: dict[str, tuple[str, str, Callable[[Path], Callable[[], Iterator[float]]]]] = {
    "datastore": ("datastore", "", ours),
    f"datastore{LATER}": ("datastore", "", ours),
    f"datastore, narrow{LATER}": ("datastore", "", ours_narrow),
    "datastore, planning alone": ("datastore", "", ours_planned),
    "datastore, digests alone": ("datastore", "", ours_digests),
    "ndarray gather, narrow": ("flat", "", lambda folder: gather(folder, widened=False)),
    "memmap gather, widened": ("flat", "", lambda folder: gather(folder, widened=True)),
    "memmap, as nanoGPT": ("flat", "", nanogpt),
    "MosaicML Streaming": ("mds", "mosaicml-streaming", mds),
    "LitData": ("litdata", "litdata", litdata),
    "WebDataset": ("webdataset", "webdataset", webdataset),
    "Grain": ("grain", "grain", grain),
    "HF datasets": ("hf", "datasets", hf),
    "Lance": ("lance", "pylance", lance_map),
}
"""By name: the format, the package, and the reader."""

"""In the loops of others: a run that is stopped and resumed sees what the undisturbed one saw, at every step of several epochs.

What each framework sees is written down by the samples' own numbers, so a batch lost, repeated or in another order shows.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from datastore.dataset.snapshot import Dataset
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere
from datastore.torch import SampleDataset, TokenDataset, stream

pytestmark = pytest.mark.filterwarnings("ignore")

SEQ, BATCH, STEPS = 16, 4, 8
EPOCH = 3  # Batches of an epoch: 10 samples, the last batch has two.


class Stop(Exception):  # noqa: N818 - no error
    """Pulls the plug in the middle of a step."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "data", [[100], [61, 7]], block_bytes=4096)


def samples(dataset: Dataset, **options: Any) -> SampleDataset:
    return SampleDataset(dataset, seq_len=SEQ, seed=3, options=LoaderSettings(**options))


def loader_of(dataset: Dataset, **options: Any) -> Loader:
    return Loader(dataset, seq_len=SEQ, global_batch=BATCH, seed=3, options=LoaderSettings(threads=1, **options))


def rows_of(tokens: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in tokens]


@pytest.fixture(scope="module")
def in_order(dataset: Dataset) -> list[tuple[int, ...]]:
    """The samples of four epochs, as the order has them."""
    loader = Loader(dataset, seq_len=SEQ, global_batch=1, seed=3)
    return [rows_of(next(stream(loader)).tokens)[0] for _ in range(4 * loader.samples_per_epoch)]


def test_a_number_is_a_position_of_the_order(dataset: Dataset, in_order: list[tuple[int, ...]]) -> None:
    four = samples(dataset, epochs=4)
    assert len(four) == len(in_order) == 40
    assert rows_of(torch.stack([four[number]["input_ids"] for number in range(40)])) == in_order
    one = samples(dataset)
    one.set_epoch(2)
    assert rows_of(torch.stack([item["input_ids"] for item in one.__getitems__(range(10))])) == in_order[20:30]
    assert one[-1]["labels"].tolist() == list(in_order[29])
    with pytest.raises(IndexError, match="10 samples"):
        one[10]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes_after_every_batch(
    dataset: Dataset, in_order: list[tuple[int, ...]], workers: int
) -> None:
    def load() -> StatefulDataLoader[dict[str, Tensor]]:
        return StatefulDataLoader(samples(dataset, epochs=2), batch_size=BATCH, num_workers=workers)

    whole = [rows_of(batch["input_ids"]) for batch in load()]
    assert [row for batch in whole for row in batch] == in_order[:20]
    for step in range(1, len(whole)):
        first = load()
        taking = iter(first)
        for _ in range(step):
            next(taking)
        state = first.state_dict()
        again = load()
        again.load_state_dict(state)
        assert [rows_of(batch["input_ids"]) for batch in again] == whole[step:]


def test_an_epoch_reaches_workers_that_stay_alive(dataset: Dataset, in_order: list[tuple[int, ...]]) -> None:
    source = samples(dataset)
    loading = DataLoader(source, batch_size=BATCH, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(3):
        source.set_epoch(epoch)
        seen += [row for batch in loading for row in rows_of(batch["input_ids"])]
    assert seen == in_order[:30]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_samples_go_to_worker_processes(dataset: Dataset, in_order: list[tuple[int, ...]], method: str) -> None:
    source = samples(dataset)
    assert rows_of(source[0]["input_ids"][None]) == in_order[:1]  # What this process has open is not theirs.
    loading = DataLoader(source, batch_size=BATCH, num_workers=1, multiprocessing_context=method)
    assert [row for batch in loading for row in rows_of(batch["input_ids"])] == in_order[:10]


def test_passes_of_an_endless_loader_follow_each_other(dataset: Dataset) -> None:
    source = TokenDataset(loader_of(dataset))
    plain = stream(loader_of(dataset))
    loading = DataLoader(source, batch_size=None)
    assert len(loading) == EPOCH
    for _ in range(3):
        batches = [rows_of(batch.tokens) for batch in loading]
        assert batches == [rows_of(next(plain).tokens) for _ in range(EPOCH)]
    finite = DataLoader(TokenDataset(loader_of(dataset, epochs=3)), batch_size=None)
    assert len(finite) == len(list(finite)) == 8  # 30 samples


def test_a_pass_goes_on_after_an_exception(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, source = stream(loader_of(dataset)), TokenDataset(loader_of(dataset))
    batches, honest, fail = iter(source), Loader.__next__, True

    def once(loader: Loader, *arguments: Any, **named: Any) -> Any:
        nonlocal fail
        if loader is source.loader and fail:
            fail = False
            raise KeyboardInterrupt
        return honest(loader, *arguments, **named)

    assert rows_of(next(batches).tokens) == rows_of(next(plain).tokens)
    monkeypatch.setattr(Loader, "__next__", once)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert [rows_of(batch.tokens) for batch in batches] == [rows_of(next(plain).tokens) for _ in range(EPOCH - 1)]


class Passes:
    """A `TokenDataset` in a `DataLoader`, pass after pass, as a resumable iterator."""

    def __init__(self, loader: Loader) -> None:
        self._source = TokenDataset(loader)
        self._batches = iter(DataLoader(self._source, batch_size=None))

    def __next__(self) -> list[tuple[int, ...]]:
        try:
            return rows_of(next(self._batches).tokens)
        except StopIteration:
            self._batches = iter(DataLoader(self._source, batch_size=None))
            return rows_of(next(self._batches).tokens)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()


def test_passes_resume_everywhere(dataset: Dataset) -> None:
    def open_at(state: Any) -> Passes:
        loader = loader_of(dataset)
        if state is not None:
            loader.load_state_dict(state)
        return Passes(loader)

    check_resumes_everywhere(open_at, steps=3 * EPOCH)


# Hugging Face Trainer


class Watched(Trainer):  # type: ignore[misc]
    """Writes down what it is given, and may be stopped in the middle of a step."""

    seen: list[list[tuple[int, ...]]]
    stop_in: int | None = None

    def training_step(self, model: Any, inputs: dict[str, Tensor], *arguments: Any, **named: Any) -> Any:
        if len(self.seen) == self.stop_in:
            raise Stop
        self.seen.append(rows_of(inputs["input_ids"]))
        return super().training_step(model, inputs, *arguments, **named)


def hugging_face(
    dataset: Dataset, folder: Path, *, resume: str | None = None, stop_in: int | None = None, **options: Any
) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=70_000, num_key_value_heads=2, **sizes))
    trainer = Watched(model, arguments, train_dataset=samples(dataset))
    trainer.seen, trainer.stop_in = [], stop_in
    if stop_in is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Stop):
            trainer.train(resume_from_checkpoint=resume)
    return trainer.seen


@pytest.mark.parametrize(
    "options", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}], ids=["threads", "workers"]
)
def test_the_trainer_of_hugging_face(
    dataset: Dataset, in_order: list[tuple[int, ...]], tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = hugging_face(dataset, tmp_path / "whole", **options)
    assert [row for batch in whole for row in batch] == in_order[: len([row for batch in whole for row in batch])]
    for step in (1, EPOCH, EPOCH + 1):
        folder = tmp_path / f"stopped-{step}"
        first = hugging_face(dataset, folder, stop_in=step, **options)
        rest = hugging_face(dataset, folder, resume=str(folder / f"checkpoint-{step}"), **options)
        assert first + rest == whole


# Accelerate


def accelerated(dataset: Dataset, take: Callable[[Any], Any]) -> list[list[tuple[int, ...]]]:
    """Return the batches of one epoch that `take` makes of a prepared loader."""
    try:
        accelerator = Accelerator(cpu=True)
        loading = accelerator.prepare(DataLoader(samples(dataset), batch_size=BATCH))
        return [rows_of(batch["input_ids"]) for batch in take(loading)]
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


def test_accelerate(dataset: Dataset, in_order: list[tuple[int, ...]]) -> None:
    whole = accelerated(dataset, lambda loading: loading)
    assert [row for batch in whole for row in batch] == in_order[:10]
    for step in range(1, EPOCH):
        assert accelerated(dataset, lambda loading, step=step: skip_first_batches(loading, step)) == whole[step:]


def test_accelerate_refuses_a_loader_that_is_divided_already(dataset: Dataset) -> None:
    try:
        loading = Accelerator(cpu=True).prepare(DataLoader(TokenDataset(loader_of(dataset)), batch_size=None))
        with pytest.raises(TypeError, match="TensorBatch"):
            next(iter(loading))
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


# Lightning


class Module(lightning.LightningModule):
    """Writes down what it is given; with `loader`, keeps its state by itself."""

    def __init__(self, loader: Loader | None, *, stop_in: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.loader, self.stop_in = loader, stop_in
        self.seen: list[list[tuple[int, ...]]] = []

    def training_step(self, batch: Any, _number: int) -> Tensor:
        if len(self.seen) == self.stop_in:
            raise Stop
        self.seen.append(rows_of(batch["input_ids"] if isinstance(batch, dict) else batch.tokens))
        loss: Tensor = self.layer(torch.ones(1, 1)).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.loader is not None:
            checkpoint["data"] = self.loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.loader is not None:
            self.loader.load_state_dict(checkpoint["data"])


def own_state(dataset: Dataset) -> tuple[Loader | None, Any]:
    loader = loader_of(dataset)
    return loader, DataLoader(TokenDataset(loader), batch_size=None)


def its_state(dataset: Dataset) -> tuple[Loader | None, Any]:
    return None, StatefulDataLoader(TokenDataset(loader_of(dataset)), batch_size=None)


def by_number(dataset: Dataset) -> tuple[Loader | None, Any]:
    return None, StatefulDataLoader(samples(dataset, epochs=4), batch_size=BATCH)


@pytest.mark.parametrize("load", [own_state, its_state, by_number])
def test_lightning(dataset: Dataset, tmp_path: Path, load: Callable[[Dataset], tuple[Loader | None, Any]]) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    def fit(folder: Path, *, start: str | None = None, stop_in: int | None = None) -> list[list[tuple[int, ...]]]:
        loader, loading = load(dataset)
        module = Module(loader, stop_in=stop_in)
        keep = lightning.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        fitter = lightning.Trainer(max_steps=STEPS, callbacks=[keep], accelerator="cpu", **quiet)
        if stop_in is None:
            fitter.fit(module, loading, ckpt_path=start, weights_only=False)
        else:
            with pytest.raises(Stop):
                fitter.fit(module, loading, ckpt_path=start, weights_only=False)
        return module.seen

    whole = fit(tmp_path / "whole")
    plain = stream(loader_of(dataset))
    assert whole == [rows_of(next(plain).tokens) for _ in range(STEPS)] or load is by_number
    for step in (1, EPOCH - 1, EPOCH, EPOCH + 1):
        folder = tmp_path / f"stopped-{step}"
        first = fit(folder, stop_in=step)
        assert first + fit(folder, start=str(folder / f"step={step}.ckpt")) == whole


# Composer, which cannot be installed beside this torch: a loop with its calls (mosaicml 0.32.1: State._dataset_state_dict,
# State._load_dataset_state, Trainer._train_loop).


class ComposerLike:
    """Trains by epochs; each checkpoint asks the dataset of the `DataLoader` for its state, with what the loop has counted."""

    def __init__(self, loading: "DataLoader[Any]", *, stop_in: int | None) -> None:
        self.loading, self.stop_in = loading, stop_in
        self.seen: list[list[tuple[int, ...]]] = []
        self.saved: list[dict[str, Any]] = []
        self.step = self.samples_in_epoch = 0

    def save(self) -> None:
        dataset: Any = self.loading.dataset
        self.saved.append({"step": self.step, "train": dataset.state_dict(self.samples_in_epoch, True)})

    def load(self, saved: dict[str, Any]) -> None:
        self.step = saved["step"]
        dataset: Any = self.loading.dataset
        dataset.load_state_dict(saved["train"])

    def fit(self) -> list[list[tuple[int, ...]]]:
        while self.step < STEPS:
            self.samples_in_epoch = 0
            for batch in self.loading:
                if self.step == self.stop_in:
                    return self.seen
                self.seen.append(rows_of(batch.tokens))
                self.step += 1
                self.samples_in_epoch += len(batch.tokens)
                self.save()
                if self.step == STEPS:
                    break
        return self.seen


def test_a_loop_like_that_of_composer(dataset: Dataset) -> None:
    def trainer(stop_in: int | None = None) -> ComposerLike:
        return ComposerLike(DataLoader(TokenDataset(loader_of(dataset)), batch_size=None), stop_in=stop_in)

    plain = stream(loader_of(dataset))
    whole = trainer().fit()
    assert whole == [rows_of(next(plain).tokens) for _ in range(STEPS)]
    for step in range(1, STEPS):
        first = trainer(stop_in=step)  # One more batch was taken, and is lost.
        seen = first.fit()
        again = trainer()
        again.load(first.saved[-1])
        assert seen + again.fit() == whole

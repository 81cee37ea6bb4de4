"""Documents are deleted while a run goes on: nothing of them is learned any more, and all else comes when it would have."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from typing_extensions import override

from datastore.dataset.operations.append import Operation, commit_shards
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, MissingError, ResumeError
from datastore.ingestion.writers.tokens import token_writer
from datastore.loader.batch import Batch
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset, make_language, make_shard, tiny_settings
from datastore.training.launcher import Launch
from datastore.training.metrics import TrainingProgress, read_metrics
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import HostRows, MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.whole import Whole, alone
from datastore.training.run.audit import read_history, trace
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.run.split import ValidationSamples
from datastore.training.settings import ModelSettings
from datastore.training.start import resume, train
from datastore.training.validation import validation_loss

CPU = torch.device("cpu")
VOCABULARY = 50


def small_model() -> GPT:
    model = GPT(ModelSettings(layers=1, width=16, heads=2, vocab_size=VOCABULARY))
    model.initialize(torch.Generator().manual_seed(1))
    return model


def batch_of(tokens: np.ndarray, mask: np.ndarray | None) -> Batch:
    places = np.arange(len(tokens))
    columns = {} if mask is None else {"loss_mask": mask.astype(np.uint8)}
    return Batch(tokens, places, places, 0, None, columns)  # type: ignore[arg-type]


class Together(Ranks):
    """One of several ranks, whose sums are known beforehand."""

    def __init__(self, sums: float) -> None:
        super().__init__(Launch(), CPU, None)
        self._sum = sums

    @override
    def sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.full_like(values, self._sum)


def gradients(batches: list[Batch], *, micro_rows: int) -> list[torch.Tensor]:
    """Mean over ranks of what each, with one of `batches`, leaves in the parameters."""
    rows = sum(len(batch.tokens) for batch in batches)
    learned = sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches if batch.loss_mask is not None)
    summed: list[torch.Tensor] = []
    for batch in batches:
        model = small_model()
        strategy = Whole(Layout(len(batches)), Together(learned))
        strategy.distribute(model)
        pieces = strategy.pieces(HostRows(batch.tokens, batch.loss_mask), rows=micro_rows, global_batch=rows)
        strategy.backward(pieces, Lesson(Causal(), {}, CPU, "fp32"))
        found = [parameter.grad / len(batches) for parameter in model.parameters() if parameter.grad is not None]
        summed = [a + b for a, b in zip(summed, found, strict=True)] if summed else found
    return summed


@pytest.mark.parametrize("ranks", [[6], [4, 2], [1, 2, 3]])
@pytest.mark.parametrize("micro_rows", [1, 2, 6])
def test_the_gradient_is_that_of_the_mean_over_the_targets_that_count(ranks: list[int], micro_rows: int) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (6, 9)).astype(np.uint16)
    mask = generator.integers(0, 2, (6, 9)).astype(np.bool_)
    mask[1] = False  # A micro-batch of which nothing counts.
    model = small_model()
    logits = model(torch.from_numpy(tokens.astype(np.int64))[:, :-1])
    chosen = torch.from_numpy(mask[:, 1:])
    targets = torch.from_numpy(tokens.astype(np.int64))[:, 1:]
    functional.cross_entropy(logits[chosen], targets[chosen]).backward()
    borders = np.cumsum([0, *ranks])
    parts = [batch_of(tokens[a:b], mask[a:b]) for a, b in pairwise(borders)]
    for found, parameter in zip(gradients(parts, micro_rows=micro_rows), model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_that_lets_everything_count_changes_nothing() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (4, 9)).astype(np.uint16)
    for one, other in zip(
        gradients([batch_of(tokens, None)], micro_rows=2),
        gradients([batch_of(tokens, np.ones((4, 9), np.bool_))], micro_rows=2),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_batch_of_which_nothing_counts_teaches_nothing() -> None:
    tokens = np.zeros((2, 9), np.uint16)
    found = gradients([batch_of(tokens, np.zeros((2, 9), np.bool_))], micro_rows=1)
    assert all(not gradient.any() for gradient in found)
    batch = MicroBatch(torch.zeros((2, 9), dtype=torch.int64), torch.zeros((2, 9), dtype=torch.bool))
    assert Causal().loss(small_model()(batch.inputs), batch).item() == 0.0


def test_the_validation_loss_is_the_mean_over_the_targets_that_count() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (5, 9)).astype(np.uint16)
    mask = generator.integers(0, 2, (5, 9)).astype(np.bool_)
    strategy, model = alone(), small_model()
    strategy.distribute(model)
    measure = partial(validation_loss, model, lesson=Lesson(Causal(), {}, CPU, "fp32"), strategy=strategy)
    found = measure([ValidationSamples(tokens, 5, mask)], rows=2)
    logits = small_model()(torch.from_numpy(tokens.astype(np.int64))[:, :-1])[torch.from_numpy(mask[:, 1:])]
    wanted = functional.cross_entropy(logits, torch.from_numpy(tokens.astype(np.int64))[:, 1:][mask[:, 1:]])
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert found.tokens == mask[:, 1:].sum()
    whole, all_count = measure([ValidationSamples(tokens, 5)], rows=2), np.ones_like(mask)
    assert measure([ValidationSamples(tokens, 5, all_count)], rows=2).loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.tokens == 40


def ids_of(dataset: Dataset, shard: int, rows: range) -> list[str]:
    return dataset.documents(shard).column("id").to_pylist()[rows.start : rows.stop]


def begun(folder: Path, *overrides: str) -> tuple[Dataset, str]:
    """A run that has taken four steps, and its dataset."""
    dataset = make_language(folder / "data")
    run = str(folder / "run")
    train(tiny_settings(folder / "data", "train.steps=4", "eval.every=0", "checkpoint.every=0", *overrides), run)
    return dataset, run


def go_on(run: str, steps: int) -> list[TrainingProgress]:
    seen: list[TrainingProgress] = []
    resume(run, overrides=[f"train.steps={steps}"], on_progress=seen.append)
    return seen


def sessions(run: str) -> list[int]:
    """The versions that the sessions of a run read."""
    folder = RunFolder.open(run)
    names = dict.fromkeys(name for name, _ in read_history(folder).steps)
    found = [folder.session(name).data for name in names]
    return [versions.training for versions in found if versions is not None]


def test_a_run_goes_on_in_the_version_in_which_documents_were_deleted_and_says_so(tmp_path: Path) -> None:
    dataset, run = begun(tmp_path)
    delete(dataset.storage, ids=ids_of(dataset, 0, range(40)))
    seen = go_on(run, 8)
    assert "reads version 2 of the dataset, in which 40 documents are deleted: they are masked" in seen[0].note
    # What is appended is not for this run; what is deleted after that is.
    append(dataset)
    go_on(run, 10)
    delete(dataset.storage, ids=ids_of(dataset, 1, range(5)))
    assert "reads version 4 of the dataset, in which 45 documents are deleted" in go_on(run, 12)[0].note
    assert sessions(run) == [1, 2, 3, 4]
    proof = prove(run)
    assert (proof.holds, proof.purged, proof.steps, proof.distinct) == (True, 0, 12, 144)


def append(dataset: Dataset, *, operation: Operation = "append") -> None:
    info = make_shard(dataset.storage, f"{7:032x}", lengths=[500, 600])
    commit_shards(dataset.storage, [info], tokenizer=dataset.commit.tokenizer, operation=operation)


def test_samples_come_at_the_same_steps_whether_or_not_documents_were_deleted(tmp_path: Path) -> None:
    dataset, run = begun(tmp_path)
    delete(dataset.storage, ids=ids_of(dataset, 2, range(3)))
    go_on(run, 8)
    undisturbed = str(tmp_path / "undisturbed")
    train(tiny_settings(f"{tmp_path / 'data'}@1", "train.steps=8", "eval.every=0", "checkpoint.every=0"), undisturbed)
    for step in range(1, 9):
        mine, other = trace(run, step), trace(undisturbed, step)
        assert [sample.sample for sample in mine.samples] == [sample.sample for sample in other.samples]
        for ours, theirs in zip(mine.samples, other.samples, strict=True):
            for span, plain in zip(ours.spans, theirs.spans, strict=True):
                assert span.text == ("" if span.deleted else plain.text)
                assert span.document == plain.document
    gone = set(ids_of(dataset, 2, range(3)))
    spans = [span for step in range(1, 9) for sample in trace(run, step).samples for span in sample.spans]
    assert any(span.document in gone for span in spans)
    assert all(span.deleted <= (span.document in gone) for span in spans)


def test_after_a_purge_the_samples_of_earlier_steps_are_still_proven_and_their_text_is_gone(tmp_path: Path) -> None:
    dataset, run = begun(tmp_path)
    first = trace(run, 1).samples[0].spans[0]
    purge(dataset.storage, ids=[first.document])
    with pytest.raises(MissingError):
        open_dataset(dataset.storage, version=1)
    proof = prove(run)
    assert proof.holds
    assert 1 <= proof.purged < 4
    # What was trained on after the delete is the same after another purge.
    go_on(run, 6)
    purge(dataset.storage, ids=ids_of(open_dataset(dataset.storage), 3, range(1)))
    again = prove(run)
    assert again.holds
    assert proof.purged <= again.purged < 6
    blank = trace(run, 1).samples[0].spans[0]
    assert (blank.text, blank.deleted, blank.document) == ("", True, "")


def test_a_named_version_and_leaving_out_stay_with_the_version_they_began_with(tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    for name, url, mode in [
        ("named", f"{tmp_path / 'data'}@1", "mask"),
        ("left out", str(tmp_path / "data"), "compact"),
    ]:
        settings = tiny_settings(url, "train.steps=2", "eval.every=0", f'loader.deletions="{mode}"')
        train(settings, str(tmp_path / name))
    dataset = open_dataset(tmp_path / "data")
    delete(dataset.storage, ids=ids_of(dataset, 0, range(2)))
    for name in ("named", "left out"):
        assert "version" not in go_on(str(tmp_path / name), 4)[0].note
        assert sessions(str(tmp_path / name)) == [1, 1]
        assert prove(str(tmp_path / name)).holds


def test_a_version_that_a_resume_names_is_read_or_refused(tmp_path: Path) -> None:
    dataset, run = begun(tmp_path)
    delete(dataset.storage, ids=ids_of(dataset, 0, range(2)))
    append(dataset, operation="overwrite")
    url = str(tmp_path / "data")
    with pytest.raises(ResumeError, match=r"does not have the shards of the run.*version=3"):
        resume(run, overrides=["train.steps=6", f"data.url={url}@3"])
    with pytest.raises(MissingError):
        resume(run, overrides=["train.steps=6", f"data.url={url}@9"])
    resume(run, overrides=["train.steps=6", f"data.url={url}@1"])
    resume(run, overrides=["train.steps=8", f"data.url={url}@2"])
    resume(run, overrides=["train.steps=10"])
    assert sessions(run) == [1, 1, 2, 2]
    assert prove(run).holds


def test_another_version_is_refused_where_deleted_documents_are_left_out(tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    url, run = str(tmp_path / "data"), str(tmp_path / "run")
    train(tiny_settings(url, "train.steps=2", "eval.every=0", 'loader.deletions="compact"'), run)
    dataset = open_dataset(url)
    delete(dataset.storage, ids=ids_of(dataset, 0, range(2)))
    with pytest.raises(ResumeError, match="cannot change to another version"):
        resume(run, overrides=["train.steps=4", f"data.url={url}@2"])


def test_a_run_stays_where_it_is_once_its_shards_were_replaced(tmp_path: Path) -> None:
    dataset, run = begun(tmp_path)
    delete(dataset.storage, ids=ids_of(dataset, 0, range(2)))
    append(dataset, operation="overwrite")
    assert open_dataset(dataset.storage).version == 3
    assert "reads version 2" in go_on(run, 6)[0].note
    assert sessions(run) == [1, 2]


def test_a_dataset_without_a_tokenizer_asks_what_to_read_in_rank_of_what_is_deleted(tmp_path: Path) -> None:
    made = make_dataset(open_storage(tmp_path / "data"), [[900, 900]])
    url, run = str(tmp_path / "data"), str(tmp_path / "run")
    settings = tiny_settings(url, "train.steps=2", "eval.every=0", f"model.vocab_size={2**16}")
    train(settings, run)
    delete(made.storage, ids=ids_of(made, 0, range(1)))
    with pytest.raises(ConfigError, match="no tokenizer says what to read in their place"):
        go_on(run, 4)
    resume(run, overrides=["train.steps=4", "loader.end_of_text=0"])
    assert prove(run).holds


def masked_dataset(folder: Path, keep: float) -> str:
    """The small language, of which a share `keep` of the tokens is to be learned."""
    language = make_language(folder / "language")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(language.tokenizer() or b"")
    url = folder / f"masked {keep}"
    chance = np.random.default_rng(0)
    with token_writer(url, tokenizer=tokenizer, end_of_text="<end>", columns={"loss_mask": "bool"}) as out:
        for shard in range(len(language.segments)):
            values, offsets = language.token_shard(shard)
            for row, (start, stop) in enumerate(pairwise(offsets.tolist())):
                mask = chance.random(stop - start) < keep
                out.write(values[start:stop], id=f"{shard}-{row}", loss_mask=mask)
    return str(url)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(RunFolder.open(str(run)).storage)]


def test_tokens_with_a_zero_in_the_loss_mask_are_not_learned(tmp_path: Path) -> None:
    nothing = masked_dataset(tmp_path, 0.0)
    train(tiny_settings(nothing, "train.steps=3", "eval.every=3"), str(tmp_path / "run"))
    assert losses(tmp_path / "run") == [0.0, 0.0, 0.0]
    assert prove(str(tmp_path / "run")).holds


@pytest.mark.slow
def test_two_ranks_learn_the_same_from_masked_tokens_as_one(tmp_path: Path) -> None:
    url = masked_dataset(tmp_path, 0.5)
    delete(url, ids=[f"0-{row}" for row in range(20)])
    settings = tiny_settings(url, "train.steps=4", "train.micro_batch=5", "eval.every=4")
    alone = train(settings, str(tmp_path / "alone"))
    together = train(settings, str(tmp_path / "together"), processes=2)
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert together.validation_loss == pytest.approx(alone.validation_loss, rel=1e-4)
    assert prove(str(tmp_path / "together")).holds

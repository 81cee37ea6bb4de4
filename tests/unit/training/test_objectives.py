from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document
from datastore.errors import ConfigError, DependencyError
from datastore.training.export import report
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.hooks.base import Hook
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import Context, MicroBatch, Objective
from datastore.training.objectives.catalog import make_objective
from datastore.training.objectives.language import Causal
from datastore.training.parallel.lesson import Lesson
from datastore.training.parallel.passes import Ledger
from datastore.training.run.changes import changed_keys
from datastore.training.settings import DataSettings, ModelSettings, Settings
from datastore.training.validation import Evaluation


class WeightSettings(Document, frozen=True, kw_only=True):
    weight: float = 1.0


class Weighted(Causal):
    """The causal loss, times a number."""

    Settings = WeightSettings

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return self.settings.weight * super().loss(outputs, batch)  # type: ignore[attr-defined]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


def test_an_objective_is_found_by_our_name_or_by_its_path_and_owns_its_other_keys() -> None:
    assert isinstance(make_objective({"use": "causal"}), Causal)
    batch = MicroBatch(torch.tensor([[0, 1, 2]]))
    found = make_objective({"use": f"{__name__}:Weighted", "weight": 3.0}) if __name__ != "__main__" else Weighted()
    model = Table()
    assert found.loss(found.outputs(model, batch), batch).item() == pytest.approx(
        3 * torch.log(torch.tensor(4.0)).item()
    )


@pytest.mark.parametrize(
    ("table", "error", "text"),
    [
        ({"use": "casual"}, ConfigError, "no such objective"),
        ({"use": "no_such_module:Class"}, DependencyError, "an objective cannot be imported.*PYTHONPATH"),
        ({"use": "datastore.training.objectives.base:MicroBatch"}, ConfigError, "not an objective"),
        ({"use": "causal", "rate": 1}, ConfigError, "rate"),
    ],
)
def test_what_is_no_objective_is_refused(table: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_objective(table)


def test_a_resumed_run_keeps_its_objective() -> None:
    before = Settings(data=DataSettings(url="data"))
    assert before.objective == {"use": "causal"}
    after = Settings(data=DataSettings(url="data"), objective={"use": "somewhere:Else"})
    assert changed_keys(before, after) == ("objective.use",)


def test_an_objective_says_what_it_is_called_with() -> None:
    assert Objective.__abstractmethods__ == {"outputs", "loss"}


def batch_of(*, masked: bool) -> MicroBatch:
    tokens = torch.randint(0, 300, (4, 65), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(65).expand(4, -1) % 3 > 0
    return MicroBatch(tokens, mask if masked else None)


def model_of(*, tied: bool) -> GPT:
    model = GPT(ModelSettings(layers=1, width=32, heads=2, vocab_size=300, tied=tied))
    model.initialize(torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_logits_that_are_made_some_rows_at_a_time_give_the_same_loss_and_gradients(*, tied: bool, masked: bool) -> None:
    batch, found = batch_of(masked=masked), []
    for chunked in (False, True):
        model, objective = model_of(tied=tied), make_objective({"use": "causal", "chunked": chunked})
        loss = objective.loss(objective.outputs(model, batch), batch)
        loss.backward()
        found.append((loss.item(), {name: one.grad for name, one in model.named_parameters()}))
    (whole, wanted), (chunks, gradients) = found
    assert chunks == pytest.approx(whole, abs=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_loss_is_exact_where_matrices_are_multiplied_in_bfloat16() -> None:
    batch, model = batch_of(masked=False), model_of(tied=True)
    wanted = make_objective({"use": "causal"})
    exact = wanted.loss(wanted.outputs(model, batch), batch).item()
    objective = make_objective({"use": "causal", "chunked": True})
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.loss(objective.outputs(model, batch), batch).item() == pytest.approx(exact, abs=0.01)


def test_the_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.training.models.gpt._CHUNK_VALUES", 2**18)
    tokens, width, vocabulary = 512, 32, 4096
    batch = MicroBatch(torch.zeros(1, tokens + 1, dtype=torch.int64))
    most = {}
    for chunked in (False, True):
        model = GPT(ModelSettings(layers=1, width=width, heads=2, vocab_size=vocabulary))
        objective = make_objective({"use": "causal", "chunked": chunked})
        with Ledger() as ledger:
            objective.loss(objective.outputs(model, batch), batch).backward()
        most[chunked] = ledger.most_bytes
    logits_bytes = tokens * vocabulary * 4
    assert most[False] > 2 * logits_bytes
    assert most[True] < logits_bytes / 2


def test_an_output_layer_that_a_hook_watches_or_has_replaced_is_called_as_a_whole() -> None:
    model, batch, seen = model_of(tied=False), batch_of(masked=True), []
    objective = make_objective({"use": "causal", "chunked": True})
    before = objective.loss(objective.outputs(model, batch), batch).item()
    assert model.lm_head is not None
    model.lm_head.register_forward_hook(lambda _layer, inputs, _out: seen.append(inputs[0].shape))
    assert objective.loss(objective.outputs(model, batch), batch).item() == pytest.approx(before, abs=1e-6)
    assert seen == [(4, 64, 32)]


class Returns(Causal):
    returned: Any = None

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return self.returned  # type: ignore[no-any-return]


class Forgets(Hook):
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Any) -> Any:
        """Return nothing, as who forgets it does."""


@pytest.mark.parametrize(("returned", "text"), [(None, "NoneType"), (1.5, "float"), (torch.zeros(8), r"shape \[8\]")])
def test_a_loss_that_is_not_one_number_is_refused_with_the_name_of_the_objective(returned: Any, text: str) -> None:
    objective = Returns()
    objective.returned = returned
    rows = MicroBatch(torch.zeros((2, 5), dtype=torch.int64))
    with pytest.raises(ConfigError, match=f"Returns.*{text}"):
        Lesson(objective, {}, torch.device("cpu"), "fp32").of(Table(), rows)


def test_a_hook_that_forgets_to_return_the_loss_is_named() -> None:
    lesson = Lesson(Causal(), {"forgets": Forgets(Document())}, torch.device("cpu"), "fp32")
    with pytest.raises(ConfigError, match=r"Forgets.*NoneType"):
        lesson.of(Table(), MicroBatch(torch.zeros((2, 5), dtype=torch.int64)))


CLICKS = {"use": "clicks", "categories": ["module", "item"], "numbers": ["length"], "buckets": 64}


@pytest.mark.parametrize(
    ("table", "unit", "tokens"),
    [
        ({"use": "causal"}, "tokens", 24),
        ({"use": "masked", "mask_token": 3}, "tokens", 24),
        ({"use": "next_item", "items": 9}, "items", 24),
        ({"use": "preference"}, "pairs", 48),
        (CLICKS, "records", 2),
    ],
)
def test_an_objective_says_what_it_counts_and_how_many_ids_a_sample_has(
    table: dict[str, Any], unit: str, tokens: int
) -> None:
    objective = make_objective(table)
    assert (objective.unit, objective.tokens_per_sample(24)) == (unit, tokens)
    blank = objective.blank(1, Context(seed=0, seq_len=24, vocab_size=64))
    assert blank.tokens.size in {tokens, tokens + 1, tokens + 2}  # Sequences have one more, the last to be predicted.


@pytest.mark.parametrize("kind", ["clicks", "classes", "captions"])
def test_a_model_that_sees_more_than_tokens_is_reported_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_SECONDS", 0.0)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tok.json"))
    named = {"use": kind, "tokenizer": str(tmp_path / "tok.json")}
    objective = make_objective(
        CLICKS if kind == "clicks" else named | ({"labels": ["x", "y"]} if kind == "classes" else {})
    )
    shape = ModelSettings(layers=1, width=32, heads=1, mlp_width=48, vocab_size=max(2, objective.vocabulary))
    model = objective.model(shape)
    found = report._of(kind, HuggingFaceModel(model, seq_len=8, tokenizer=None, end_of_text=None, objective=objective))
    assert min(found.tokens_per_s.values()) > 0
    tables = [name for name, one in model.named_modules() if isinstance(one, nn.Embedding)]
    matrices = {name: one for name, one in model.named_parameters() if one.dim() == 2}
    looked_up = set() if kind == "captions" else {f"{name}.weight" for name in tables}  # Tied to the output layer.
    attention = 0 if kind != "classes" else 2 * shape.heads * shape.head_size * 8
    multiplied = sum(int((one != 0).sum()) for name, one in matrices.items() if name not in looked_up)
    assert found.flops_per_token == 2 * multiplied + attention


def test_a_loss_that_is_too_large_for_a_perplexity_is_told_all_the_same() -> None:
    assert Evaluation(loss=1e4, samples=1, tokens=1).perplexity == float("inf")

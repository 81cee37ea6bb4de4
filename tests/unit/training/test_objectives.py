from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datastore.document import Document
from datastore.errors import ConfigError, DependencyError
from datastore.training.objectives.base import MicroBatch, Objective
from datastore.training.objectives.catalog import make_objective
from datastore.training.objectives.language import Causal
from datastore.training.run.changes import changed_keys
from datastore.training.settings import DataSettings, Settings


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
        ({"use": "no_such_module:Class"}, DependencyError, "an objective cannot be imported"),
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

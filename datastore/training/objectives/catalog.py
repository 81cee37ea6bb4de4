"""An objective by its name in the settings."""

from collections.abc import Mapping
from typing import Any

from datastore.config import find_class
from datastore.document import convert
from datastore.training.objectives.base import Objective

__all__ = ["make_objective"]

_OURS = {
    "causal": "datastore.training.objectives.language:Causal",
    "chat": "datastore.training.objectives.language:Chat",
    "masked": "datastore.training.objectives.language:Masked",
    "preference": "datastore.training.objectives.preference:Preference",
    "classes": "datastore.training.objectives.records:Classes",
    "next_item": "datastore.training.objectives.records:NextItem",
    "clicks": "datastore.training.objectives.records:Clicks",
    "captions": "datastore.training.objectives.captions:Captions",
}


def make_objective(table: Mapping[str, Any]) -> Objective:
    """Return the objective that an `[objective]` table names: one of ours, an entry point in `datastore.objectives`, or a class.

    Raises:
        ConfigError: an unknown objective, or a setting that it does not know or that is out of range.
        DependencyError: its module cannot be imported.
    """
    kind: type[Objective] = find_class(table["use"], base=Objective, ours=_OURS, group="datastore.objectives")  # type: ignore[type-abstract]
    own = {key: value for key, value in table.items() if key != "use"}
    return kind(convert(kind.Settings, own, where="objective"))

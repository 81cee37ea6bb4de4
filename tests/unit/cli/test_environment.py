"""What a launcher's variables mean, and that wrong ones are named."""

import pytest

from datastore.cli.ranks import launched_by
from datastore.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_without_a_launcher_there_is_nothing_to_say() -> None:
    assert launched_by({"HOME": "/root", "MASTER_PORT": "29500"}) is None


def test_what_torchrun_sets_is_taken_over() -> None:
    assert launched_by(TORCHRUN) == {
        "rank": 3,
        "world": 4,
        "local_rank": 1,
        "local_world": 2,
        "host": "head",
        "port": 29500,
        "agent_store": True,
        "attempt": 2,
    }


def test_how_often_ranks_were_started_counts_only_where_the_agent_answers_them() -> None:
    """Rank 0 answers anew each time; and an agent that joins a run has counted less than the others."""
    found = launched_by(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert found is not None
    assert (found["agent_store"], found["attempt"]) == (False, 0)


def test_one_rank_needs_no_place_to_meet() -> None:
    assert launched_by({"RANK": "0", "WORLD_SIZE": "1"}) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-1"),
        ("WORLD_SIZE", "four"),
        ("RANK", "4"),
        ("LOCAL_RANK", "2"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"variable='{name}', value='{value}'"):
        launched_by(TORCHRUN | {name: value})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"variable='{name}'"):
        launched_by({key: value for key, value in TORCHRUN.items() if key != name})

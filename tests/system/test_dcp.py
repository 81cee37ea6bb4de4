"""`dcp.save` and `dcp.load` with a run of ours behind them: any layout into any other, both ways, and what is refused."""

import pickle
import subprocess
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.exchange.dcp import DcpReader, DcpWriter
from datastore.checkpoint.keeping import Keep

PROGRAM = Path(__file__).with_name("dcp_programs.py")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def on_ranks(world: int, folder: Path, *jobs: str) -> None:
    meeting = f"file://{folder}/meeting-{uuid.uuid4().hex}"
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(world), meeting, folder, *jobs],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


def test_what_two_ranks_saved_is_loaded_by_one_and_by_two_in_any_layout(tmp_path: Path) -> None:
    layouts = ("rows", "columns", "copies")
    loads = [f"{one}>{other}" for one in layouts for other in layouts]
    on_ranks(2, tmp_path, *(f"save:{layout}" for layout in (*layouts, "fsdp")), *loads, "fsdp>fsdp")
    on_ranks(1, tmp_path, *(f"{layout}>copies" for layout in layouts), "fsdp>fsdp")
    on_ranks(2, tmp_path, "flipped")


@pytest.mark.slow
def test_what_four_ranks_saved_is_loaded_by_three_and_by_one(tmp_path: Path) -> None:
    layouts = ("rows", "grid", "copied rows")
    saves = [f"save:{layout}" for layout in (*layouts, "fsdp", "planes")]
    loads = [f"{one}>{other}" for one in layouts for other in layouts]
    on_ranks(4, tmp_path, *saves, *loads, "fsdp>fsdp", "planes>planes")
    for world in (1, 3):
        on_ranks(world, tmp_path, *(f"{one}>rows" for one in layouts), "fsdp>fsdp", "planes>planes")


def alone(call: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def test_a_run_of_ours_is_loaded_by_dcp_and_the_other_way_round(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, other = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    with Checkpointer(run) as ck:
        ck.save(3, {"model": model, "lists": {"a": [torch.arange(3), 7], "b": (1, 2)}}, blocking=True)
    state = {"model": other.state_dict(), "lists": {"a": [torch.zeros(3, dtype=torch.int64), 0], "b": None}}
    alone(dcp.load, state, storage_reader=DcpReader(run))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(state["lists"]["a"][0], torch.arange(3))
    assert (state["lists"]["a"][1], state["lists"]["b"]) == (7, (1, 2))
    alone(dcp.save, {"model": other.state_dict(), "epoch": 2}, storage_writer=DcpWriter(run, step=4, keep=Keep(last=1)))
    third = torch.nn.Linear(5, 4)
    with Checkpointer(run) as ck:
        assert ck.steps() == [4]
        assert not ck.verify(4).bad
        epoch = {"epoch": 0}
        assert ck.restore({"model": third, "_root": epoch}).step == 4
    assert torch.equal(third.weight, model.weight)
    assert epoch == {"epoch": 2}


def test_tied_weights_are_written_once_and_values_keep_their_kinds(tmp_path: Path) -> None:
    shared = torch.randn(64, 64)
    state = {
        "a": {"w": shared, "v": shared.t()},
        "b": {"w": shared},
        "n": {"inf": float("inf"), "big": 2**70, "no": None},
    }
    alone(dcp.save, state, checkpoint_id=tmp_path / "1", storage_writer=DcpWriter())
    assert sum(part.stat().st_size for part in (tmp_path / "parts").glob("*.safetensors")) < 2.5 * shared.nbytes
    into = {"a": {"w": torch.zeros(64, 64), "v": torch.zeros(64, 64)}, "b": {"w": torch.zeros(64, 64)}}
    values = {"n": {"inf": 0, "big": 0, "no": 0}}
    both = into | values
    alone(dcp.load, both, checkpoint_id=tmp_path / "1", storage_reader=DcpReader())
    assert torch.equal(into["a"]["w"], shared)
    assert torch.equal(into["a"]["v"], shared.t())
    assert torch.equal(into["b"]["w"], shared)
    assert both["n"] == {"inf": float("inf"), "big": 2**70, "no": None}


class Thing:
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": {"thing": Thing()}}, "cannot be stored"),
        ({"x": (torch.ones(2),)}, "holds a tensor"),
        ({"_root": {"x": 1}}, "this key of the state is taken"),
        ({"no name": {"x": 1}}, "not a name for an item"),
    ],
)
def test_what_cannot_be_stored_is_named_and_there_is_no_step(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointException, match=message):
        alone(dcp.save, state, checkpoint_id=tmp_path / "5", storage_writer=DcpWriter())
    with Checkpointer(tmp_path) as ck:
        assert ck.steps() == []


def test_nothing_is_cast_overwritten_or_guessed(tmp_path: Path) -> None:
    alone(dcp.save, {"a": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "step_5", storage_writer=DcpWriter())
    into = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(CheckpointException, match="what is saved does not fit"):
        alone(dcp.load, {"a": {"w": into}}, checkpoint_id=tmp_path / "step_5", storage_reader=DcpReader())
    assert not into.any()
    for step in (5, 4):
        with pytest.raises(CheckpointException, match="has this step already, or later ones"):
            alone(dcp.save, {"a": {}}, checkpoint_id=tmp_path / f"step_{step}", storage_writer=DcpWriter())
    with pytest.raises(CheckpointException, match="no such step"):
        alone(dcp.load, {"a": {"w": into}}, checkpoint_id=tmp_path / "step_6", storage_reader=DcpReader())


def test_async_save_is_an_ordinary_step(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        tensor = torch.ones(1000)
        future = alone(
            dcp.async_save, {"a": {"w": tensor}}, checkpoint_id=tmp_path / "r" / "1", storage_writer=DcpWriter()
        )
        tensor.zero_()
        future.result()
    finally:
        torch.distributed.destroy_process_group()
    into = torch.zeros(1000)
    with Checkpointer(tmp_path / "r") as ck:
        ck.restore({"a": {"w": into}})
    assert into.eq(1).all()


def test_a_writer_can_be_sent_to_the_process_that_saves_in_the_background(tmp_path: Path) -> None:
    writer = DcpWriter(keep=Keep(last=1))
    for step in (1, 2):
        writer = pickle.loads(pickle.dumps(writer))  # As `async_checkpointer_type=AsyncCheckpointerType.PROCESS` does.
        alone(
            dcp.save,
            {"model": {"w": torch.full((3,), step)}},
            checkpoint_id=tmp_path / f"step-{step}",
            storage_writer=writer,
        )
    with Checkpointer(tmp_path) as ck:
        state = {"w": torch.zeros(3, dtype=torch.int64)}
        assert (ck.restore({"model": state}).step, ck.steps(), state["w"].tolist()) == (2, [2], [2, 2, 2])

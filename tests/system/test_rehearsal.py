"""A rehearsal says what the run then takes, and leaves nothing behind."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from datastore.cli.results import tell_needs
from datastore.errors import ConfigError, DatastoreError
from datastore.testing.examples import tiny_settings
from datastore.training.models.gpt import GPT
from datastore.training.run.folder import RunFolder
from datastore.training.start import dry_run, train
from datastore.units import format_bytes

PROGRAM = """
import sys
from pathlib import Path
from datastore.testing.examples import tiny_settings
from datastore.training.start import train
print(train(tiny_settings(*sys.argv[3:]), sys.argv[1], processes=int(sys.argv[2])).step)
"""

SHAPE = (
    "model.layers=4",
    "model.width=192",
    "model.vocab_size=16384",
    "data.seq_len=256",
    "train.steps=4",
    "eval.every=0",
)

TOLERANCE = 0.1


def highest(pid: int) -> int:
    """Return the most memory that any of the process and its children has had."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    own = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    peak = next((int(line.split()[1]) * 1024 for line in own if line.startswith("VmHWM:")), 0)
    return max(peak, *(highest(int(child)) for child in children), 0)


def peak_of(language: str, run: Path, processes: int, *overrides: str) -> int:
    """Return the highest peak of a rank; an allocator that keeps what is freed would hide what is needed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    arguments = [sys.executable, "-c", PROGRAM, str(run), str(processes), language, *SHAPE, *overrides]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        most = 0
        while process.poll() is None:
            try:
                most = max(most, highest(process.pid))
            except OSError:
                break
            threading.Event().wait(0.02)
        assert process.stdout is not None
        assert process.stdout.read().strip() == "4"
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ()),
        pytest.param(1, ("train.precision=bf16", "train.micro_batch=4"), marks=pytest.mark.slow),
        pytest.param(1, ("train.recompute=true", "checkpoint.every=0"), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.shard=2",), marks=pytest.mark.slow),
        pytest.param(2, (), marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_run_is_what_its_rehearsal_said(
    language: str, tmp_path: Path, processes: int, overrides: tuple[str, ...]
) -> None:
    arguments = [language, *SHAPE, *overrides]
    program = (
        "import sys, json, msgspec\n"
        "from datastore.testing.examples import tiny_settings\n"
        "from datastore.training.start import dry_run\n"
        "print(json.dumps(msgspec.to_builtins(dry_run(tiny_settings(*sys.argv[3:]), sys.argv[1], processes=int(sys.argv[2])).memory)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run"), str(processes), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not (tmp_path / "run").exists()
    needed = json.loads(said.stdout)["peak_bytes"]
    assert needed == pytest.approx(peak_of(language, tmp_path / "run", processes, *overrides), rel=TOLERANCE)


EMA: dict[str, Any] = {"use": "ema"}
PRUNE: dict[str, Any] = {"use": "prune"}


@pytest.mark.parametrize("hooks", [(), (EMA, PRUNE)])
def test_a_checkpoint_is_as_large_as_said(language: str, tmp_path: Path, hooks: tuple[dict[str, Any], ...]) -> None:
    settings = tiny_settings(language, "train.steps=2", "checkpoint.every=0", "model.width=128", hooks=hooks)
    needs = dry_run(settings, tmp_path / "run")
    train(settings, tmp_path / "run")
    stored = sum(one.size_bytes for one in RunFolder.open(str(tmp_path / "run")).storage.list("parts"))
    assert needs.checkpoint_bytes == pytest.approx(stored, rel=0.02)


def test_what_hooks_keep_is_counted_and_saved(language: str, tmp_path: Path) -> None:
    weights = dry_run(tiny_settings(language), tmp_path / "run").memory.weights_bytes
    shapes = GPT(tiny_settings(language).model).named_parameters()
    matrices = sum(one.numel() for name, one in shapes if one.dim() == 2 and "embed" not in name)
    for hooks, kept in (
        ((), 0),
        ((EMA,), weights),
        ((PRUNE,), matrices),  # A mask takes a byte for each weight.
        ((EMA, PRUNE), weights + matrices),
        (({"use": "training_hooks:Average"},), weights + 4),
    ):
        needs = dry_run(tiny_settings(language, hooks=hooks), tmp_path / "run")
        assert needs.memory.hook_bytes == kept, hooks
        assert needs.checkpoint_bytes == 3 * weights + kept, hooks
        assert not needs.notes
    shared = dry_run(tiny_settings(language, "parallel.shard=4", hooks=(EMA,)), tmp_path / "run", processes=4)
    assert shared.memory.hook_bytes == pytest.approx(weights / 4, rel=0.01)


def test_each_part_that_takes_memory_is_printed(
    language: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(language, "parallel.shard=2", "checkpoint.every=5", hooks=(EMA,))
    needs = dry_run(settings, tmp_path / "run", processes=2)
    tell_needs(needs)
    said = capsys.readouterr().out
    for name in ("process", "weights", "gathered", "gradient", "optimizer", "activation", "save", "hook"):
        assert f"\n  {name:13} {format_bytes(getattr(needs.memory, f'{name}_bytes'))}\n" in said
    assert "loader" not in said, "the data lie on this machine"


def test_a_teacher_is_counted_whole_on_each_rank_and_not_saved(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, "train.steps=1", "model.width=64"), str(tmp_path / "teacher"))
    alone = dry_run(tiny_settings(language, "model.width=64"), tmp_path / "run")
    for sizes in ((), ("parallel.shard=2",)):
        taught = tiny_settings(language, *sizes, hooks=({"use": "distill", "teacher": str(tmp_path / "teacher")},))
        needs = dry_run(taught, tmp_path / "run", processes=2 if sizes else 1)
        assert needs.memory.hook_bytes == alone.memory.weights_bytes
    assert needs.checkpoint_bytes == dry_run(tiny_settings(language), tmp_path / "run").checkpoint_bytes


@pytest.mark.parametrize("bits", [0, 4])
def test_adapters_can_be_rehearsed_and_their_base_is_stored_once(language: str, tmp_path: Path, bits: int) -> None:
    """Torch 2.13 refuses to move modules that are made without numbers, and an integer base read its shape from a tensor."""
    hooks = ({"use": "adapt", "base_bits": bits},)
    settings = tiny_settings(language, "model.width=64", "checkpoint.every=5", "checkpoint.keep=2", hooks=hooks)
    needs = dry_run(settings, tmp_path / "run")
    learned = needs.memory.gradient_bytes
    assert learned < needs.memory.weights_bytes
    train(settings, str(tmp_path / "run"))
    run = RunFolder.open(str(tmp_path / "run")).storage
    stored = sum(one.size_bytes for one in run.list("parts") if one.key.endswith(".safetensors"))
    assert stored == pytest.approx(needs.checkpoints_bytes, rel=0.08), "the first step, for its base, and two more"


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ({"use": "prune", "parameters": ["x.*"]}, "no matrix to prune"),
        ({"use": "prune", "method": "wanda", "samples": 10**6}, "the calibration set is shorter than asked"),
        ({"use": "distill", "teacher": "nobody"}, "there is no run"),
        ({"use": "distill"}, "there is no teacher"),
        ({"use": "quantize", "qat_from": 20}, "rounding begins after the last step"),
    ],
)
def test_hooks_that_cannot_begin_are_refused_at_the_rehearsal(
    language: str, tmp_path: Path, hook: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DatastoreError, match=reason):
        dry_run(tiny_settings(language, hooks=(hook,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_hooks_that_need_whole_logits_are_refused_where_there_are_none(language: str, tmp_path: Path) -> None:
    chunked = tiny_settings(language, "objective={use='causal', chunked=true}", hooks=({"use": "distill"},))
    for begin in (dry_run, train):
        with pytest.raises(ConfigError, match="only some rows at a time"):
            begin(chunked, tmp_path / "run")


def test_a_hook_that_looks_at_numbers_is_named_and_not_counted(language: str, tmp_path: Path) -> None:
    needs = dry_run(tiny_settings(language, hooks=({"use": "training_hooks:Largest"}, EMA)), tmp_path / "run")
    (note,) = needs.notes
    assert note.startswith("what 0.training_hooks:Largest keeps is not counted, as it looks at numbers")
    assert needs.memory.hook_bytes == needs.memory.weights_bytes, "the other one is"


def test_what_cannot_fit_is_refused_before_anything_is_written(language: str, tmp_path: Path) -> None:
    huge = tiny_settings(language, "model.width=65536", "model.layers=200", "model.heads=512", "model.kv_heads=512")
    with pytest.raises(ConfigError, match="does not fit into memory"):
        dry_run(huge, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ranks_that_share_sequences_divide_activations_but_not_keys_and_values(language: str, tmp_path: Path) -> None:
    shape = ["data.global_batch=2", "data.seq_len=256", "model.width=64", "model.heads=2", "model.layers=2"]
    alone, four = (
        dry_run(tiny_settings(language, *shape, f"parallel.context={ranks}"), tmp_path / "run", processes=ranks).memory
        for ranks in (1, 4)
    )
    others = 2 * (2 * 192 * 64) * 2 * 4  # Keys and values, of two rows, three quarters of the tokens, in two layers.
    kept = alone.activation_bytes // 4 + others
    assert four.activation_bytes == pytest.approx(kept, rel=0.01)
    assert four.weights_bytes == alone.weights_bytes


def test_ranks_that_share_parameters_need_less(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "model.width=256", "parallel.shard=4")
    alone = dry_run(tiny_settings(language, "model.width=256"), tmp_path / "run")
    shared = dry_run(settings, tmp_path / "run", processes=4)
    assert shared.memory.optimizer_bytes == pytest.approx(alone.memory.optimizer_bytes / 4, rel=0.01)
    assert shared.parameters == alone.parameters
    assert shared.checkpoint_bytes == alone.checkpoint_bytes

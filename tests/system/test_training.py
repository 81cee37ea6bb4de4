"""A run comes out the same, whatever happens to it in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
import pytest
import torch

from datastore.checkpoint.inspect import list_steps
from datastore.document import encode
from datastore.errors import ConfigError, ConflictError, DatastoreError, ResumeError, WaitError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import open_model
from datastore.training.export.inference import evaluate
from datastore.training.metrics import MetricsWriter, TrainingProgress, read_metrics
from datastore.training.run.audit import read_history
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.run.record import record_bytes
from datastore.training.settings import Settings
from datastore.training.start import resume, train

HERE = Path(__file__).parent
PRUNE = {"use": "prune", "ratio": 4.0, "every": 3}
NOISE = {"use": "training_hooks:Noise"}

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import msgspec  # noqa: E402
from datastore.training.settings import Settings  # noqa: E402
from datastore.training.start import train
settings = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=Settings)
train(settings, sys.argv[3], on_progress=lambda progress: print(progress.step, flush=True))
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return open_model(str(run)).model.state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def record(run: Path) -> bytes:
    return record_bytes([entry for _, entry in read_history(RunFolder.open(str(run))).steps])


def start(settings: Settings, run: Path, program: str = PROGRAM) -> "subprocess.Popen[str]":
    """Start `train` in a process of its own, which prints a line for each progress."""
    file = run.with_suffix(".json")
    file.write_bytes(encode(settings))
    arguments = [sys.executable, "-c", program, str(HERE), str(file), str(run)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_learns_and_its_record_is_proven(language: str, tmp_path: Path) -> None:
    result = train(tiny_settings(language, "train.steps=60"), str(tmp_path / "run"))
    assert not result.stopped
    assert result.validation_loss is not None
    assert result.validation_loss < 1.5
    proof = prove(str(tmp_path / "run"))
    assert proof.holds
    assert (proof.steps, proof.samples, proof.distinct) == (60, 720, proof.epoch_samples)


def test_metrics_have_one_record_for_each_step(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, hooks=(PRUNE,)), str(tmp_path))
    found = read_metrics(RunFolder.open(str(tmp_path)).storage)
    assert [line["step"] for line in found] == list(range(1, 21))
    assert {
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "data_wait",
        "memory_bytes",
        "cache_hits",
        "storage_requests",
        "sparsity",
    } <= found[0].keys()
    assert [line["step"] for line in found if "validation_loss" in line] == [10, 20]
    assert found[-1]["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert found[-1]["memory_bytes"] > 2**20


def test_metrics_say_how_the_cache_fares(language: str, tmp_path: Path) -> None:
    """Of a dataset that lies elsewhere: in an archive, which is no file that a block can be mapped from."""
    shutil.make_archive(str(tmp_path / "set"), "zip", language)
    cached = [f"loader.cache_dir={tmp_path / 'cache'}", "loader.cache_bytes=1000000", "train.steps=3"]
    train(tiny_settings(f"zip://{tmp_path / 'set.zip'}", *cached), str(tmp_path / "first"))
    train(tiny_settings(f"zip://{tmp_path / 'set.zip'}", *cached), str(tmp_path / "second"))
    first, second = (read_metrics(RunFolder.open(str(tmp_path / name)).storage)[-1] for name in ("first", "second"))
    assert 0 < first["cache_fetched_bytes"] <= first["cache_filled_bytes"]  # The validation samples came before.
    assert second["cache_fetched_bytes"] == 0
    assert second["cache_disk_hit_bytes"] == second["cache_filled_bytes"] == first["cache_filled_bytes"]
    assert 0 <= second["cache_hit_rate"] <= 1
    assert second["cache_wait_s"] >= 0
    assert second["loss"] == first["loss"]


def test_metrics_go_to_tensorboard_if_asked_for(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, "train.steps=3", "metrics.tensorboard=true"), str(tmp_path))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()


def test_metrics_of_a_step_taken_twice_are_those_of_the_later_session() -> None:
    storage = MemoryStorage("twice")
    for session, steps in (("1", range(1, 9)), ("2", range(5, 7))):
        writer = MetricsWriter(storage, session=session, first_step=steps[0])
        for step in steps:
            writer.write({"step": step, "session": session})
        writer.close()
    assert [(line["step"], line["session"]) for line in read_metrics(storage)] == [
        *((step, "1") for step in range(1, 5)),
        *((step, "2") for step in range(5, 7)),
    ]


def test_a_run_that_was_killed_in_the_middle_of_steps_ends_with_the_same_bits(language: str, tmp_path: Path) -> None:
    kills = tmp_path / "kills.json"
    settings = tiny_settings(language, hooks=(PRUNE, NOISE, {"use": "training_hooks:Kill", "file": str(kills)}))
    train(settings, str(tmp_path / "undisturbed"))
    steps = [3, 7, 12]
    kills.write_text(json.dumps(steps))
    for _ in steps:
        killed = start(settings, tmp_path / "killed")
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
    result = train(settings, str(tmp_path / "killed"))
    assert result.resumed_from in {5, 10}, "at step 10 it waited for the save of step 5, and maybe ended that of 10"
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert record(tmp_path / "killed") == record(tmp_path / "undisturbed")
    assert prove(str(tmp_path / "killed")).holds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments_change_no_bit(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=700", "checkpoint.every=3", "eval.every=50", hooks=(PRUNE, NOISE))
    train(settings, str(tmp_path / "undisturbed"))
    random = Random(7)
    for _ in range(20):
        process = start(settings, tmp_path / "killed")
        assert process.stdout is not None
        process.stdout.readline()
        threading.Event().wait(random.uniform(0, 0.6))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run must not end before it has been killed often enough"
    result = train(settings, str(tmp_path / "killed"))
    assert 0 < result.resumed_from < 700
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert record(tmp_path / "killed") == record(tmp_path / "undisturbed")
    proof = prove(str(tmp_path / "killed"))
    assert proof.holds
    assert proof.sessions > 5


@pytest.mark.slow
def test_three_ranks_that_were_killed_and_resumed_end_with_the_same_bits(language: str, tmp_path: Path) -> None:
    kills = tmp_path / "kills.json"
    hook = {"use": "training_hooks:Kill", "file": str(kills)}
    settings = tiny_settings(language, "train.steps=10", "checkpoint.every=2", hooks=(PRUNE, NOISE, hook))
    train(settings, str(tmp_path / "undisturbed"), processes=3)
    kills.write_text("[6]")
    with pytest.raises(WaitError, match="rank=0, cause='SIGKILL'"):
        train(settings, str(tmp_path / "killed"), processes=3)
    assert resume(str(tmp_path / "killed"), processes=3).resumed_from in {4, 6}, (
        "the save of step 6 waited for that of 4"
    )
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert record(tmp_path / "killed") == record(tmp_path / "undisturbed")


def test_any_number_of_ranks_and_micro_batches_learns_the_same(language: str, tmp_path: Path) -> None:
    """13 samples on 1 rank; on 2, of which one gets more; accumulated; and first on 1, then on 2."""
    batch = "data.global_batch=13"
    train(tiny_settings(language, batch), str(tmp_path / "1"))
    train(tiny_settings(language, batch), str(tmp_path / "2"), processes=2)
    train(tiny_settings(language, batch, "train.micro_batch=5"), str(tmp_path / "micro"))
    train(tiny_settings(language, batch, "checkpoint.every=10"), str(tmp_path / "changed"), on_progress=_stop_at(7))
    resumed = resume(str(tmp_path / "changed"), processes=2)
    assert 7 <= resumed.resumed_from < 20
    expected = [line["loss"] for line in read_metrics(RunFolder.open(str(tmp_path / "1")).storage)]
    for name in ("2", "micro", "changed"):
        losses = [line["loss"] for line in read_metrics(RunFolder.open(str(tmp_path / name)).storage)]
        assert losses == pytest.approx(expected, abs=1e-5), name
        assert record(tmp_path / name) == record(tmp_path / "1"), name
    assert prove(str(tmp_path / "changed")).worlds == [1, 2]


def _stop_at(step: int) -> Callable[[TrainingProgress], None]:
    """Return a progress that asks the run to stop, once: a second signal would end this process."""
    asked: list[int] = []

    def look(progress: TrainingProgress) -> None:
        if progress.step >= step and not asked:
            asked.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    return look


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_returns(language: str, tmp_path: Path, number: signal.Signals) -> None:
    settings = tiny_settings(language, "train.steps=100000", "checkpoint.every=0", "eval.every=0")
    process = start(settings, tmp_path / "run")
    assert process.stdout is not None
    while int(process.stdout.readline() or "-1") == 0:
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = len(read_history(RunFolder.open(str(tmp_path / "run"))).steps)
    assert 0 < step < 100000
    assert resume(str(tmp_path / "run"), overrides=[f"train.steps={step + 2}"]).resumed_from == step


JOB = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import msgspec  # noqa: E402
from datastore.training.settings import Settings  # noqa: E402
from datastore.training.start import train
settings = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=Settings)
train(settings, sys.argv[3], processes=2, on_progress=lambda progress: print(progress.step, flush=True))
"""


def test_a_signal_to_the_launcher_and_all_its_ranks_is_one_request(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=100000", "checkpoint.every=0", "eval.every=0")
    process = start(settings, tmp_path / "run", program=JOB)
    assert process.stdout is not None
    while int(process.stdout.readline() or "-1") == 0:
        pass
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    for pid in (*children, *children):
        os.kill(pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert 0 < len(read_history(RunFolder.open(str(tmp_path / "run"))).steps) < 100000


def test_a_second_signal_ends_the_process_at_once(language: str, tmp_path: Path) -> None:
    hook = {"use": "training_hooks:Hang", "step": 1}
    process = start(tiny_settings(language, "checkpoint.every=1", hooks=(hook,)), tmp_path / "run")
    assert process.stdout is not None
    while int(process.stdout.readline() or "-1") == 0:
        pass
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_writer_is_refused_while_the_first_works_on(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=100000", "checkpoint.every=0")
    process = start(settings, tmp_path / "run")
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(ConflictError, match=f"pid={process.pid}"):
        train(settings, str(tmp_path / "run"))
    process.kill()
    process.communicate()
    resume(str(tmp_path / "run"), overrides=["train.steps=2"])


def test_other_settings_or_data_are_refused_by_the_keys_that_differ(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=2")
    train(settings, str(tmp_path / "run"))
    with pytest.raises(ResumeError, match=r"\['data.seed', 'model.width'\]"):
        train(tiny_settings(language, "train.steps=2", "data.seed=1", "model.width=64"), str(tmp_path / "run"))
    make_language(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match="another dataset"):
        resume(str(tmp_path / "run"), overrides=[f"data.url={tmp_path / 'other'}"])


def test_what_does_not_work_is_not_in_the_way_of_what_does(language: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="longer than the whole dataset"):
        train(tiny_settings(language, "data.seq_len=100000"), str(run))
    with pytest.raises(ConfigError, match="no such hook"):
        train(tiny_settings(language, hooks=({"use": "unknown"},)), str(run))
    assert not [path for path in run.rglob("*") if path.is_file()]
    train(tiny_settings(language, "train.steps=2"), str(run))


def test_a_folder_of_something_else_is_left_alone(language: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        train(tiny_settings(language), str(tmp_path))
    with pytest.raises(ConfigError, match="holds no run"):
        train(tiny_settings(language), language)


def test_a_finished_run_is_left_as_it_is(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=4")
    train(settings, str(tmp_path / "run"))
    again = train(settings, str(tmp_path / "run"))
    assert (again.step, again.resumed_from, again.stopped) == (4, 4, False)


def test_more_ranks_than_samples_are_refused(language: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more ranks than samples"):
        train(tiny_settings(language), str(tmp_path / "run"), processes=13)
    with pytest.raises(ConfigError, match="at least one rank"):
        train(tiny_settings(language), str(tmp_path / "run"), processes=0)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "optim.lr=1e30", "optim.warmup=0", "optim.clip=0", "checkpoint.every=1")
    with pytest.raises(DatastoreError, match="not finite"):
        train(settings, str(tmp_path / "run"))
    assert list_steps(RunFolder.open(str(tmp_path / "run")).storage) == []
    assert resume(str(tmp_path / "run"), overrides=["optim.lr=1e-3"]).step == 20


@pytest.mark.parametrize("processes", [1, 2])
def test_a_parameter_that_no_loss_reaches_is_refused_before_the_first_step_and_named(
    language: str, tmp_path: Path, processes: int
) -> None:
    settings = tiny_settings(language, hooks=({"use": "training_hooks:Spare"},))
    with pytest.raises(ConfigError, match=r"parameters=\['spare'\]"):
        train(settings, str(tmp_path / "run"), processes=processes)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_parameter_that_only_the_loss_of_a_hook_reaches_trains_on_two_ranks(language: str, tmp_path: Path) -> None:
    hooks = ({"use": "training_hooks:Spare", "used": True},)
    settings = tiny_settings(language, "train.steps=3", "data.global_batch=12", hooks=hooks)
    train(settings, str(tmp_path / "1"))
    train(settings, str(tmp_path / "2"), processes=2)
    losses = [
        [line["loss"] for line in read_metrics(RunFolder.open(str(tmp_path / name)).storage)] for name in ("1", "2")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weights_that_no_run_could_go_on_from_are_not_saved_and_a_lower_rate_goes_on_from_those_before(
    language: str, tmp_path: Path
) -> None:
    wild = ("optim.use='sgd'", "optim.lr=1e38", "optim.clip=0", "optim.warmup=6", "optim.floor=1.0")
    hooks = ({"use": "training_hooks:Tame", "until": 3},)
    rest = ("optim.weight_decay=0", "eval.every=0", "checkpoint.every=1", "checkpoint.keep=1", "train.steps=8")
    settings = tiny_settings(language, *wild, *rest, hooks=hooks)
    with pytest.raises(DatastoreError, match=r"weights whose loss is not finite \(step=4\)"):
        train(settings, str(tmp_path / "run"))
    notes: list[str] = []
    overrides = ["optim.lr=1e-3"]
    result = resume(
        str(tmp_path / "run"), overrides=overrides, on_progress=lambda progress: notes.append(progress.note)
    )
    assert (result.resumed_from, result.step) == (3, 8)
    assert any("from here on optim.lr = 0.001 (before: 1e+38)" in note for note in notes)
    assert [session.changed for session in RunFolder.open(str(tmp_path / "run")).sessions()] == [
        {},
        {"optim.lr": (1e38, 1e-3)},
    ]


def test_a_validation_loss_that_is_not_finite_is_no_end_of_a_run(language: str, tmp_path: Path) -> None:
    own = ("objective.use='training_hooks:BlindInValidation'", "train.steps=4", "eval.every=2")
    with pytest.raises(DatastoreError, match="the validation loss is not finite"):
        train(tiny_settings(language, *own), str(tmp_path / "run"))


def test_a_hook_that_only_exports_may_change_in_a_run_and_the_change_is_recorded(language: str, tmp_path: Path) -> None:
    run, short = str(tmp_path / "run"), "train.steps=2"
    train(tiny_settings(language, short, hooks=(PRUNE, {"use": "quantize", "group": 16})), run)
    train(tiny_settings(language, short, hooks=(PRUNE, {"use": "quantize", "bits": 4})), run)
    train(tiny_settings(language, short, hooks=(PRUNE,)), run)
    with pytest.raises(ResumeError, match=r"\['hooks.0.prune.ratio'\]"):
        train(tiny_settings(language, short, hooks=(PRUNE | {"ratio": 8.0},)), run)
    assert [list(session.changed) for session in RunFolder.open(run).sessions()] == [[], ["hooks"], ["hooks"]]


def test_sessions_and_their_metrics_are_in_the_order_in_which_they_came_whatever_the_clocks_say(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    for hour, steps in ((9, 2), (8, 4), (7, 6)):
        monkeypatch.setattr("datastore.training.session.session.new_session", lambda hour=hour: f"{hour:024x}")
        train(tiny_settings(language, f"train.steps={steps}"), run)
    folder = RunFolder.open(run)
    assert [session.from_step for session in folder.sessions()] == [0, 2, 4]
    assert [line["step"] for line in read_metrics(folder.storage)] == [1, 2, 3, 4, 5, 6]


def test_settings_survive_the_run_folder(language: str, tmp_path: Path) -> None:
    settings = tiny_settings(language, "train.steps=2", hooks=(PRUNE,))
    train(settings, str(tmp_path / "run"))
    assert RunFolder.open(str(tmp_path / "run")).config().settings == settings
    assert msgspec.json.decode((tmp_path / "run" / "config.json").read_bytes())["settings"]["hooks"] == [PRUNE]


def test_an_objective_of_ones_own_is_what_is_trained_on_and_validated_with(language: str, tmp_path: Path) -> None:
    short = ("train.steps=2", "eval.every=2")
    plain = train(tiny_settings(language, *short), str(tmp_path / "plain"))
    own = ("objective.use='training_hooks:Scaled'", "objective.by=1e-6")
    scaled = train(tiny_settings(language, *short, *own), str(tmp_path / "scaled"))
    assert plain.loss is not None
    assert scaled.loss is not None
    assert scaled.loss == pytest.approx(1e-6 * plain.loss, rel=0.2)
    assert scaled.validation_loss == pytest.approx(evaluate(str(tmp_path / "scaled")).loss, rel=1e-4)
    assert evaluate(str(tmp_path / "scaled")).loss < 1e-5

"""The manifests of docs/scale.md are what schedulers take, and what they start is what the command line takes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import datastore as ds
from datastore.cli.main import cli

FOLDER = Path(__file__).parents[2] / "docs" / "manifests"
KUBERNETES = ("1.31", "1.37")
BATCH = sorted(FOLDER.glob("*.sbatch"))
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def jobs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the plain jobs that a manifest is made of."""
    if manifest["kind"] == "Job":
        return [manifest]
    parts = manifest["spec"]["replicatedJobs"]
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}, "spec": part["template"]["spec"]}
        for part in parts
    ]


def scripts(manifest: dict[str, Any]) -> list[str]:
    """Return what the shells of its containers run."""
    containers = [each for job in jobs(manifest) for each in job["spec"]["template"]["spec"]["containers"]]
    assert all(each["command"] == ["sh", "-c"] for each in containers)
    return [each["args"][0] for each in containers]


def refused_by_kubernetes(job: dict[str, Any], version: str = KUBERNETES[-1]) -> str:
    validate = pytest.importorskip("kubernetes_validate")
    try:
        validate.validate(job, version, strict=True)
    except validate.ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_jobs(path: Path, version: str) -> None:
    for job in jobs(read(path)):
        assert refused_by_kubernetes(job, version) == ""


def test_kubernetes_refuses_a_job_with_a_misspelt_key() -> None:
    job = read(FOLDER / "ingest-job.yaml")
    job["spec"]["completionsMode"] = "Indexed"
    assert "completionsMode" in refused_by_kubernetes(job)


def test_jobset_takes_the_training_run() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")
    manifest = read(FOLDER / "train-jobset.yaml")
    # A key that the model does not know would be missing in what it gives back.
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


def test_an_ingest_that_cannot_succeed_is_not_tried_again() -> None:
    spec = read(FOLDER / "ingest-job.yaml")["spec"]
    rule = spec["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert spec["completions"] == spec["parallelism"] == int(re.findall(r"JOB_COMPLETION_INDEX/(\d+)", str(spec))[0])


def test_a_save_may_take_as_long_as_the_scheduler_allows() -> None:
    """torchrun kills its processes 30 s after SIGTERM, whatever the scheduler grants."""
    script = (FOLDER / "train.sbatch").read_text(encoding="utf-8")
    pod = jobs(read(FOLDER / "train-jobset.yaml"))[0]["spec"]["template"]["spec"]
    told = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    granted = {
        int(re.findall(r"--signal=TERM@(\d+)", script)[0]): int(re.findall(r"SHUTDOWN_TIMEOUT=(\d+)", script)[0]),
        pod["terminationGracePeriodSeconds"]: int(told["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]),
    }
    assert all(30 < timeout < grace for grace, timeout in granted.items())


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_a_shell_can_read_the_batch_scripts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", path], check=True)
    # sbatch stops looking for its lines at the first command.
    assert "#SBATCH" not in text[text.index("set -euo pipefail") :]


def command_lines() -> list[tuple[str, str]]:
    """Return every call of the command line in a manifest, with the manifest's name."""
    texts = [(path.name, text) for path in MANIFESTS for text in scripts(read(path))]
    texts += [(path.name, path.read_text(encoding="utf-8").replace("\\\n", " ")) for path in BATCH]
    found = [(name, line) for name, text in texts for line in re.findall(r"\bdatastore ((?:ingest|train) .*)", text)]
    assert len(found) == len(texts)
    return found


@pytest.mark.parametrize("line", [pytest.param(line, id=name) for name, line in command_lines()])
def test_the_command_line_knows_every_option(line: str) -> None:
    words = shlex.split(re.sub(r"\$(?:\{.*?\}|\w+)", "1", line))
    command = cli.commands[words[0]]
    assert isinstance(command, click.Command)
    command.make_context(words[0], words[1:]).close()


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with sources, and an environment in which `srun` starts what it is given and `scontrol` names this machine."""
    (tmp_path / "src").mkdir()
    for number in range(9):
        rows = "".join(f'{{"text": "document {number} {row}"}}\n' for row in range(50))
        (tmp_path / "src" / f"{number}.jsonl").write_text(rows, encoding="utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {"srun": 'exec "$@"', "scontrol": "echo localhost"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tmp_path, {**os.environ, "PATH": path}


def tokenizer(folder: Path, environment: dict[str, str]) -> None:
    words = ["datastore", "tokenizer", "train", "src", "--vocab", "300", "--to", "tok.json"]
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_the_shares_of_an_ingest_make_one_commit(scheduler: str, machine: tuple[Path, dict[str, str]]) -> None:
    folder, environment = machine
    tokenizer(folder, environment)
    script = scripts(read(FOLDER / "ingest-job.yaml"))[0].replace("/64", "/3").replace("--workers 8", "--workers 2")
    for index in (2, 0, 1):
        if scheduler == "slurm":
            words = ["bash", str(FOLDER / "ingest.sbatch"), "src", "data", "tok.json"]
            told = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "2"}
        else:
            words = ["sh", "-c", script]
            told = {"JOB_COMPLETION_INDEX": str(index), "SOURCE": "src", "TARGET": "data", "TOKENIZER": "tok.json"}
        done = subprocess.run(words, cwd=folder, env=environment | told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    dataset = ds.open(folder / "data")
    assert (dataset.version, dataset.totals.documents) == (1, 450)


@pytest.mark.slow
def test_a_training_job_that_is_submitted_again_goes_on(machine: tuple[Path, dict[str, str]]) -> None:
    if shutil.which("torchrun", path=machine[1]["PATH"]) is None:
        pytest.skip("torch is not installed")
    folder, environment = machine
    tokenizer(folder, environment)
    subprocess.run(
        ["datastore", "ingest", "src", "--to", "data", "--tokenizer", "tok.json"],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    run = '[data]\nurl = "data"\nseq_len = 16\nglobal_batch = 4\n[model]\nlayers = 1\nwidth = 32\nheads = 2\n[train]\nsteps = 4\n'
    (folder / "run.toml").write_text(run + "[checkpoint]\nevery = 2\n[eval]\nevery = 0\n", encoding="utf-8")
    told = {"SLURM_JOB_NODELIST": "node[1-1]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7"}
    for _ in range(2):
        done = subprocess.run(
            ["bash", FOLDER / "train.sbatch", "run.toml", "runs/first"],
            cwd=folder,
            env=environment | told | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run(["datastore", "prove", "runs/first"], cwd=folder, env=environment, check=True, capture_output=True)

"""Adapters learn beside a frozen model, go on after a kill, and are what peft reads."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from datastore.errors import ConfigError, WaitError
from datastore.loader.settings import Rank
from datastore.testing.examples import tiny_settings
from datastore.training.export.averaging import average
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import Sampling, evaluate, generate
from datastore.training.export.others import export_adapter, export_gguf
from datastore.training.hooks.adapt import Adapt, AdaptSettings
from datastore.training.hooks.bottleneck import add_bottlenecks, bottleneck_table
from datastore.training.metrics import read_metrics
from datastore.training.models.gpt import GPT
from datastore.training.run.folder import RunFolder, open_split
from datastore.training.settings import ModelSettings
from datastore.training.start import resume, train

pytestmark = pytest.mark.filterwarnings("ignore")

ADALORA: dict[str, Any] = {"use": "adapt", "method": "adalora", "rank": 2, "every": 1}
LORA: dict[str, Any] = {"use": "adapt", "rank": 2}
BOTTLENECK: dict[str, Any] = {"use": "adapt", "method": "bottleneck", "rank": 2}


@pytest.fixture(scope="module")
def base(language: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    train(tiny_settings(language, "train.steps=15", "model.tied=false", "eval.every=0"), str(folder / "run"))
    return str(folder / "run")


def settings(base: str, *overrides: str, hooks: tuple[Mapping[str, Any], ...], sizes: Mapping[str, int]) -> Any:
    table = [f"parallel.{name}={size}" for name, size in {"data": 0, "shard": 1, **sizes}.items()]
    fixed = [f"model.init='{base}'", "optim.warmup=0", "optim.floor=1", "eval.every=0", "checkpoint.every=2"]
    url = RunFolder.open(base).config().settings.data.url
    return tiny_settings(url, *fixed, "train.steps=12", *table, *overrides, hooks=tuple(dict(hook) for hook in hooks))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(RunFolder.open(str(run)).storage)]


def test_ranks_of_the_command_line_pass_over_what_libraries_say_of_themselves(base: str, tmp_path: Path) -> None:
    """Torchao 0.18 warns of kernels that are not for this machine, and torch 2.13 of torchao, whenever peft imports it."""
    hooks = '[{use="adapt", rank=2}]'
    command = [sys.executable, "-m", "datastore", "fork", base, "--to", str(tmp_path / "run"), "--progress", "none"]
    few = ["--processes", "2", "--set", "train.steps=1", "--set", f"hooks={hooks}"]
    done = subprocess.run([*command, *few], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("finished step 1 of 1")
    assert done.stderr == ""


def assert_same(one: Path, other: Path) -> None:
    first, second = (open_model(str(run)).model.state_dict() for run in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("hook", "processes", "sizes"),
    [
        (ADALORA, 1, {}),
        pytest.param(LORA, 2, {"shard": 2}, marks=pytest.mark.slow),
        (BOTTLENECK, 2, {"shard": 2}),
        pytest.param(BOTTLENECK | {"base_bits": 4}, 2, {"data": 2}, marks=pytest.mark.slow),
        pytest.param(ADALORA, 2, {"data": 2}, marks=pytest.mark.slow),
        pytest.param(LORA | {"method": "dora"}, 2, {"shard": 2}, marks=pytest.mark.slow),
        pytest.param(LORA | {"base_bits": 4}, 2, {"shard": 2}, marks=pytest.mark.slow),
    ],
)
def test_adapters_go_on_after_a_kill_with_the_same_bits(
    hook: Mapping[str, Any], processes: int, sizes: Mapping[str, int], base: str, tmp_path: Path
) -> None:
    kills = tmp_path / "kills.json"
    wanted = settings(base, hooks=(hook, {"use": "training_hooks:Kill", "file": str(kills)}), sizes=sizes)
    train(wanted, str(tmp_path / "once"), processes=processes)
    kills.write_text("[7]")
    with pytest.raises(WaitError, match="SIGKILL"):
        start(wanted, str(tmp_path / "killed"), processes)
    resume(str(tmp_path / "killed"), processes=processes)
    assert losses(tmp_path / "once")[-3:] == losses(tmp_path / "killed")[-3:]
    assert_same(tmp_path / "once", tmp_path / "killed")


def start(wanted: Any, run: str, processes: int) -> None:
    """Train in processes that may die."""
    from multiprocessing import get_context

    if processes > 1:
        train(wanted, run, processes=processes)
        return
    process = get_context("spawn").Process(target=train, args=(wanted, run))
    process.start()
    process.join()
    if process.exitcode == -9:
        raise WaitError("it died", cause="SIGKILL")


@torch.no_grad()
def loss_of(model: Any, run: str) -> float:
    tokens = torch.from_numpy(open_split(RunFolder.open(run).config()).samples(16, seq_len=32, rank=Rank())[0].mine)
    logits = model(tokens[:, :-1].long()).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long()).item()


def test_peft_puts_several_adapters_on_one_base_with_the_losses_of_their_runs(base: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(base, tmp_path / "base")
    hooks = {"lora": LORA, "dora": LORA | {"method": "dora"}}
    for name, hook in hooks.items():
        train(settings(base, hooks=(hook,), sizes={}), str(tmp_path / name))
        export_adapter(tmp_path / name, tmp_path / f"{name}-files")
        export(tmp_path / name, tmp_path / f"{name}-merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    both = PeftModel.from_pretrained(model, tmp_path / "lora-files", adapter_name="lora").eval()
    both.load_adapter(tmp_path / "dora-files", adapter_name="dora")
    for name in hooks:
        both.set_adapter(name)
        ours = evaluate(str(tmp_path / name), samples=16).loss
        assert loss_of(both, base) == pytest.approx(ours, abs=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged", dtype=torch.float32).eval()
        assert loss_of(merged, base) == pytest.approx(ours, abs=1e-5)
        assert ours < evaluate(base, samples=16).loss


def test_peft_reads_the_ranks_that_adalora_has_left(base: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(settings(base, hooks=(ADALORA,), sizes={}), str(tmp_path / "run"))
    export(base, tmp_path / "base")
    export_adapter(tmp_path / "run", tmp_path / "files")
    pattern = json.loads((tmp_path / "files" / "adapter_config.json").read_bytes())["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 2 * len(ranks), "exactly the budget"
    assert len(set(ranks)) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, tmp_path / "files").eval()
    assert loss_of(theirs, base) == pytest.approx(evaluate(str(tmp_path / "run"), samples=16).loss, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "bottleneck"])
def test_adapters_change_nothing_at_first_and_learn_from_the_first_step_on(method: str) -> None:
    model = GPT(ModelSettings(layers=1, width=32, heads=2, vocab_size=32))
    model.initialize(torch.Generator().manual_seed(1))
    ids = torch.arange(20).view(2, 10)
    before = model(ids).detach()
    Adapt(AdaptSettings(method=method, rank=4)).model(model)  # type: ignore[arg-type]
    after = model(ids)
    torch.testing.assert_close(after.detach(), before, atol=1e-6, rtol=1e-5)
    functional.cross_entropy(after.flatten(0, 1), ids.flatten()).backward()
    ends = ("lora_B.default.weight", "lora_B.default", "bottleneck_up")
    last = [one for name, one in model.named_parameters() if name.endswith(ends) and one.requires_grad]
    assert last
    assert all(one.grad is not None and bool(one.grad.abs().sum() > 0) for one in last)


def test_ranks_reach_the_budget_whatever_the_number_of_steps_becomes(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(base, "train.steps=8", "checkpoint.every=1", hooks=(ADALORA,), sizes={}), str(run))
    for steps in (20, 21):
        resume(str(run), overrides=[f"train.steps={steps}"])
        rank = [line["adapter_rank"] for line in read_metrics(RunFolder.open(str(run)).storage)][-1]
        assert rank == 2.0


def test_a_frozen_base_is_stored_once(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(base, "checkpoint.keep=9", hooks=(LORA,), sizes={}), str(run))
    weights = sum(one.numel() * 4 for one in open_model(base).model.state_dict().values())
    first, *rest = (file.stat().st_size for file in sorted((run / "parts").glob("*.safetensors")))
    trained = sum(one.numel() * 4 for one in _adapters(run))
    assert first > weights
    assert max(rest) < 3 * trained + 40_000, "weights and two moments of the adapters, and their names"
    assert max(rest) < first / 2


def _adapters(run: Path) -> list[torch.Tensor]:
    from datastore.training.export.export import restored

    model = restored(RunFolder.open(str(run)), step=None).state.model
    return [one for one in model.parameters() if one.requires_grad]


def test_a_model_with_merged_adapters_is_quantized_behind_them(base: str, tmp_path: Path) -> None:
    hooks = (LORA, {"use": "quantize", "bits": 8})
    train(settings(base, hooks=hooks, sizes={}), str(tmp_path / "run"))
    train(settings(base, hooks=(LORA,), sizes={}), str(tmp_path / "plain"))
    assert evaluate(str(tmp_path / "run")).loss == pytest.approx(evaluate(str(tmp_path / "plain")).loss, abs=0.01)
    export_gguf(tmp_path / "run", tmp_path / "gguf")
    assert (tmp_path / "gguf" / "model.gguf").stat().st_size > 0


@pytest.mark.parametrize(
    ("hooks", "sizes", "fact"),
    [
        (({"use": "adapt", "layers": ["nothing"]},), {}, "no layer"),
        (({"use": "adapt", "layers": ["model.embed_tokens"]},), {}, "only linear layers are adapted"),
        (({"use": "adapt", "method": "dora", "base_bits": 4},), {}, "real rows"),
        (({"use": "quantize"}, LORA), {}, "adapt"),
        ((BOTTLENECK | {"layers": ["*q_proj"]},), {}, "ends attention"),
        ((BOTTLENECK, {"use": "quantize"}), {}, "cannot be merged"),
        ((LORA, {"use": "quantize", "qat_from": 2}), {}, "Leave out qat_from, or adapt"),
        ((ADALORA,), {"shard": 2}, r"share the work like this .*parallel.shard=2"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_the_first_step(
    hooks: tuple[Mapping[str, Any], ...], sizes: Mapping[str, int], fact: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fact):
        train(settings(base, hooks=hooks, sizes=sizes), str(tmp_path / "run"), processes=max(1, *sizes.values(), 1))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_bottleneck_changes_nothing_at_first_and_learns_beside_the_frozen_weights(base: str, tmp_path: Path) -> None:
    train(settings(base, "train.steps=60", hooks=(BOTTLENECK | {"rank": 8},), sizes={}), str(tmp_path / "run"))
    kept = open_model(base).model
    adapted = open_model(str(tmp_path / "run")).model.state_dict()
    assert all(
        torch.equal(one, adapted[name if name in adapted else name.replace(".weight", ".base_layer.weight")])
        for name, one in kept.state_dict().items()
    )
    assert evaluate(str(tmp_path / "run"), samples=16).loss < evaluate(base, samples=16).loss
    assert generate(str(tmp_path / "run"), "w1", sampling=Sampling(tokens=2)).startswith("w1")
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        before = kept(ids)
        add_bottlenecks(kept, bottleneck_table(["model.layers.0.mlp.down_proj"], rank=2))
        assert torch.equal(kept(ids), before)


def test_a_bottleneck_is_written_apart_in_a_hundredth_of_the_base_and_put_on_it_again(
    language: str, tmp_path: Path
) -> None:
    wide = "model.width=128"
    train(tiny_settings(language, "train.steps=2", "eval.every=0", wide), str(tmp_path / "base"))
    run = tmp_path / "run"
    train(settings(str(tmp_path / "base"), wide, hooks=(BOTTLENECK | {"rank": 1},), sizes={}), str(run))
    export_adapter(run, tmp_path / "files")
    model = open_model(str(tmp_path / "base")).model
    base_bytes = sum(one.numel() * one.element_size() for one in model.parameters())
    assert (tmp_path / "files" / "adapter_model.safetensors").stat().st_size < 0.01 * base_bytes
    table = json.loads((tmp_path / "files" / "adapter_config.json").read_bytes())
    add_bottlenecks(model, table, load_file(tmp_path / "files" / "adapter_model.safetensors"))
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model(ids), open_model(str(run)).model(ids))


def test_what_needs_ordinary_weights_refuses_a_bottleneck_and_writes_nothing(base: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(settings(base, "checkpoint.keep=9", hooks=(BOTTLENECK,), sizes={}), run)
    writers: list[Callable[[str, str], object]] = [
        export,
        export_gguf,
        partial(export, quantize="int8"),
        partial(average, last=2),
    ]
    for number, write in enumerate(writers):
        with pytest.raises(ConfigError, match="there is a nonlinearity between"):
            write(run, str(tmp_path / f"to-{number}"))
        assert not (tmp_path / f"to-{number}").exists()
    with pytest.raises(ConfigError, match="there is a nonlinearity between"):
        train(settings(run, hooks=(LORA,), sizes={}), str(tmp_path / "next"))


def test_a_run_without_adapters_has_none_to_export(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no adapters"):
        export_adapter(base, tmp_path / "files")
    assert not (tmp_path / "files").exists()

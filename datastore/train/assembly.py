"""The parts of a run, put together in the one order that works: model, hooks, device, ranks, optimizer, loader.

Hooks change the model before it is compiled and distributed, and see it again when the optimizer exists. The same seed gives
the same initial weights on any device, as they are drawn on the CPU.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from datastore.digest import digest_bytes
from datastore.errors import CorruptError
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.place import Place
from datastore.training.distributed import Ranks, cores
from datastore.training.hooks.base import Hook, HookSet, RunState, make_hooks
from datastore.training.model import GPT, Block
from datastore.training.objectives import Causal, MicroBatch, Objective
from datastore.training.optim import learning_rate, make_optimizer, named_state
from datastore.training.run.data import Split
from datastore.training.run.folder import RunConfig
from datastore.training.settings import Settings, StepSettings
from datastore.training.trainer import Work
from datastore.training.validation import autocast

__all__ = ["Machine", "Parts", "assemble", "build_model", "use_machine"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the settings that say "auto" became here."""

    precision: str
    compiled: bool
    threads: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a session works with."""

    settings: Settings
    machine: Machine
    run: RunState
    wrapped: nn.Module
    """The model as the loop calls it; `run.model` is what hooks and checkpoints see."""

    hooks: Mapping[str, Hook]
    objective: Objective
    loader: Loader
    vocab_size: int
    ranks: Ranks

    @property
    def micro_rows(self) -> int:
        """Samples per forward pass."""
        share = -(-self.settings.data.global_batch // self.ranks.world)
        return min(self.settings.train.micro_batch or share, share)

    def items(self) -> dict[str, Any]:
        """Return what a checkpoint holds, besides the record; tensors are the live ones."""
        return {
            "model": self.run.model,
            "optim": named_state(self.run.model, self.run.optimizer),
            "hooks": HookSet(self.hooks),
            "data": self.loader,
        }

    def work(self, guard: Callable[[], AbstractContextManager[None]]) -> Work:
        """Return what the loop needs."""
        optim, steps = self.settings.optim, self.settings.train
        return Work(
            model=self.wrapped,
            objective=self.objective,
            hooks=tuple(self.hooks.values()),
            ranks=self.ranks,
            batches=partial(_next_batch, self.loader, self.vocab_size),
            rows=self.settings.data.global_batch,
            micro_rows=self.micro_rows,
            precision=self.machine.precision,
            clip=optim.clip,
            rate=lambda step: learning_rate(optim, step, steps.steps),
            guard=guard,
            seed=steps.seed,
        )


def use_machine(settings: StepSettings, ranks: Ranks, *, threads: int) -> Machine:
    """Set torch up for this rank; `threads` is what an earlier session used, 0 if there was none."""
    device = ranks.device
    threads = settings.threads or threads or max(1, cores() // ranks.launch.local_world)
    torch.set_num_threads(threads)
    # On a CPU every kernel used here gives the same bits each time; the switch would only slow down what is not used.
    torch.use_deterministic_algorithms(settings.deterministic and device.type == "cuda", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported()
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16"))
    precision = settings.precision if settings.precision != "auto" else ("bf16" if native else "fp32")
    compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
    return Machine(precision, compiled, threads)


def build_model(config: RunConfig) -> GPT:
    """Return the GPT of a run with its initial weights, on the CPU."""
    model = GPT(msgspec.structs.replace(config.settings.model, vocab_size=config.vocab_size))
    seed = digest_bytes(f"{config.settings.train.seed}/weights".encode())[:8]
    model.initialize(torch.Generator().manual_seed(int.from_bytes(seed, "big")))
    return model


def assemble(config: RunConfig, split: Split, ranks: Ranks, *, machine: Machine) -> Parts:
    """Return the parts of the run before its first step.

    Raises:
        ConfigError: a hook is unknown or wrongly set; the dataset has no sample.
    """
    settings = config.settings
    hooks = make_hooks(settings.hooks, where="settings")
    model: nn.Module = build_model(config)
    for hook in hooks.values():
        model = hook.model(model)
    model.to(ranks.device)
    if machine.compiled:
        for block in _blocks(model):
            block.compile()
    wrapped = ranks.distribute(model)
    objective = Causal()
    run = RunState(
        model=model,
        optimizer=make_optimizer(model, settings.optim),
        step=0,
        steps=settings.train.steps,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )
    for hook in hooks.values():
        hook.start(run)
    loader = Loader(
        split.training,
        seq_len=settings.data.seq_len,
        global_batch=settings.data.global_batch,
        seed=settings.data.seed,
        place=Place(ranks.rank, ranks.world),
        options=settings.loader,
    )
    parts = Parts(settings, machine, run, wrapped, hooks, objective, loader, config.vocab_size, ranks)
    if ranks.world > 1 or machine.compiled:
        ranks.settle(wrapped, partial(_loss_of_zeros, parts))
    return parts


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return what is compiled, each by itself: the same code, so it is compiled once, and hooks keep their modules."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _loss_of_zeros(parts: Parts) -> torch.Tensor:
    shape = (parts.micro_rows, parts.settings.data.seq_len + 1)
    batch = MicroBatch(torch.zeros(shape, dtype=torch.int64, device=parts.run.device))
    with autocast(parts.run.device, parts.machine.precision):
        return parts.objective.loss(parts.objective.outputs(parts.wrapped, batch), batch)


def _next_batch(loader: Loader, vocab_size: int) -> Batch:
    """Return the next batch; a token that the model has no embedding for would end a GPU's process without a word."""
    batch = next(loader)
    largest = int(batch.tokens.max())
    if largest >= vocab_size:
        raise CorruptError(
            "a token is outside of the vocabulary",
            token=largest,
            vocab_size=vocab_size,
            cursor=batch.cursor,
            hint="Set model.vocab_size, or ingest with a tokenizer.",
        )
    return batch

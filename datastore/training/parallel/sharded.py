"""Every rank has a part of each parameter: FSDP2 (`shard`), HSDP (`data` x `shard`), tensor parallel (`tensor`), and both together.

FSDP2 takes the model apart block by block: a block's parameters are gathered for its own passes only. Tensor parallelism
follows the plan of the model: each rank has some of the heads, and some of the columns inside the feed-forward part;
between them it has some of the tokens (sequence parallel), and of the logits some of the vocabulary (loss parallel).

Where both cut a parameter, they cut different dimensions: along the same one its rows would lie in strides, which no
box of a checkpoint describes. The price is that `shard` must divide the model's width then.

All ranks draw the same initial weights, and each keeps its part: the whole model must fit into the memory of a rank once.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook
from datastore.training.models.gpt import GPT
from datastore.training.models.huggingface import units_of
from datastore.training.objectives.base import MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.norm import clip_everywhere, settle_partial
from datastore.training.parallel.strategy import Strategy
from datastore.training.parallel.sync.attach import averager, hook_shards, rests_item
from datastore.training.parallel.sync.feedback import Feedback
from datastore.training.run.profile import part

__all__ = ["Planned", "Sharded", "cut_matrices", "mesh_of", "plain_loss", "shard_blocks", "share_weights"]


def mesh_of(layout: Layout, device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks, its dimensions as in `Layout`; ranks that share a sequence are copies, too."""
    sizes = (layout.pipeline, layout.copies, layout.shard, layout.tensor)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "data", "shard", "tensor"))


def share_weights(model: nn.Module) -> None:
    """Overwrite the weights of every rank with those of rank 0."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)


def shard_blocks(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> None:
    """Let FSDP2 take `model` apart over the dimensions of `mesh` that are in use: block by block, and blocks that share a matrix together."""
    over = mesh["data", "shard"] if layout.copies > 1 else mesh["shard"]
    for unit in units_of(model):
        fully_shard(unit, mesh=over, reshard_after_forward=True, shard_placement_fn=_other_dimension)
    fully_shard(model, mesh=over, reshard_after_forward=True, shard_placement_fn=_other_dimension)


def _other_dimension(parameter: nn.Parameter) -> Shard:
    """Return the first dimension that tensor parallelism does not cut already."""
    cut = (
        {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
        if isinstance(parameter, DTensor)
        else set()
    )
    return Shard(1) if 0 in cut else Shard(0)


@runtime_checkable
class Planned(Protocol):
    """A model that says how tensor parallelism cuts its modules."""

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Return the plan for `parallelize_module`; it must reach every parameter."""
        ...


def cut_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the matrices of `model` over `mesh`, as its plan says.

    Raises:
        ConfigError: there is no plan for it, or the plan leaves a parameter out.
    """
    if isinstance(model, GPT):
        plan = _plan(model)
        replaced = [
            name for name in plan if name.endswith("_proj") and not isinstance(model.get_submodule(name), nn.Linear)
        ]
        if replaced:
            raise ConfigError(
                "a hook has put layers into the model that tensor parallelism cannot cut",
                layers=replaced[:8],
                hint="Use parallel.data and parallel.shard, or leave the hook out.",
            )
        parallelize_module(model, mesh, plan)
        # The output layer may be the embedding, so it has no plan of its own: it meets whole rows of the last norm.
        model.model.norm.register_forward_hook(lambda _norm, _inputs, x: x.redistribute(placements=[Replicate()]))
    elif isinstance(model, Planned):
        parallelize_module(model, mesh, model.tensor_plan())
    else:
        raise ConfigError(
            "there is no plan for cutting the matrices of this model",
            model=type(model).__name__,
            hint="Give it a method tensor_plan() that returns one for parallelize_module, or use parallel.shard.",
        )
    plain = [name for name, one in model.named_parameters() if not isinstance(one, DTensor)]
    if plain:
        raise ConfigError(
            "the plan of this model leaves parameters out",
            parameters=plain[:8],
            hint="Name their modules in tensor_plan(), or use parallel.shard.",
        )


class Sharded(Strategy):
    """Parameters as DTensors."""

    @override
    def distribute(self, model: nn.Module) -> nn.Module:
        mesh = mesh_of(self.layout, self.ranks.device)
        share_weights(model)
        if self.layout.tensor > 1:
            cut_matrices(model, mesh["tensor"])
        if self.layout.learners > 1:
            shard_blocks(model, mesh, self.layout)
        self._mean = averager(self.sync, self.ranks.world)
        if isinstance(self._mean, Feedback):
            self.keeps = True
            hook_shards(model, self._mean)
        self._model = model
        return model

    @override
    def backward(self, pieces: Sequence[Piece], lesson: Lesson) -> Tensor:
        total = torch.zeros((), device=self.ranks.device)
        for number, piece in enumerate(pieces, start=1):
            if isinstance(self._model, FSDPModule):
                self._model.set_requires_gradient_sync(number == len(pieces))
            with self._cut_logits(lesson):
                loss = self._loss(piece.rows, lesson)
                with part("backward"):
                    (loss * (piece.share * self.layout.learners * lesson.scale)).backward()  # type: ignore[no-untyped-call]
            total += plain_loss(loss.detach()) * piece.share
        settle_partial(self._model.parameters())
        return total if self.place.tensor == 0 else total * 0.0

    def _loss(self, rows: MicroBatch, lesson: Lesson) -> Tensor:
        outputs = lesson.outputs(self._model, rows)
        if isinstance(outputs, DTensor) and not _knows_parts(lesson):
            outputs = outputs.full_tensor()
        return lesson.loss(outputs, rows)

    def _cut_logits(self, lesson: Lesson) -> AbstractContextManager[None]:
        """Return the context in which the loss is that of logits of which each rank has some columns."""
        return loss_parallel() if self.layout.tensor > 1 and _knows_parts(lesson) else nullcontext()

    @override
    def evaluate(self, rows: MicroBatch, lesson: Lesson, *, size: int) -> Tensor:
        rows = self.seen(rows)
        with self._cut_logits(lesson):
            loss = plain_loss(self._loss(rows, lesson))
        return self.joined(loss, rows)

    @override
    def probe(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        with self._mean.exact() if self._mean is not None else nullcontext():
            return super().probe(model, lesson, rows)

    @override
    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return super().items(model, optimizer) | rests_item("shards", self._mean)

    @override
    def metrics(self) -> dict[str, float]:
        return {} if self._mean is None else {"sync_sent_bytes": self._mean.sent_bytes}

    @override
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        return clip_everywhere(model.parameters(), limit, copies=self.layout.world)


def _knows_parts(lesson: Lesson) -> bool:
    """Whether the loss is our cross-entropy alone: any other may look at all logits of a token."""
    return type(lesson.objective) is Causal and all(type(hook).loss is Hook.loss for hook in lesson.hooks.values())


def plain_loss(loss: Tensor) -> Tensor:
    """Return `loss` as a tensor of this rank alone."""
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def _plan(model: GPT) -> dict[str, ParallelStyle]:
    """Return how each module of a GPT is cut; between the parts of a block each rank has some of the tokens."""
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
    }
    if model.lm_head is not None:
        plan["lm_head"] = ColwiseParallel(input_layouts=Replicate(), use_local_output=False)
    for layer in range(len(model.model.layers)):
        block = f"model.layers.{layer}"
        plan |= {
            f"{block}.input_layernorm": SequenceParallel(),
            f"{block}.self_attn": PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            f"{block}.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            f"{block}.post_attention_layernorm": SequenceParallel(),
            f"{block}.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            f"{block}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan |= {f"{block}.{name}": ColwiseParallel() for name in names}
    return plan

"""Every rank has some of the layers: 1F1B, or interleaved 1F1B where a rank has several parts of the model.

The first part has the embedding, the last one the last norm and the output layer. Where those two are one matrix, both parts
have it: their gradients are added up, so both move alike, and it counts once in the norm and in a checkpoint. Parameters keep the names that they have in
the whole model, so a checkpoint does not tell how many parts there were. What a rank does not have it shows to the
checkpointer as a tensor of other ranks, with no element here.

torch's schedules want as many pieces as they were made for, all of the same shape, so a share of a batch is filled up with
rows that count nothing. Gradients of the copies of a part (`data`) are averaged after the schedule, in one message;
with `shard`, FSDP2 takes each part apart. With `tensor`, the matrices of each part are cut as without a pipeline, and a message
holds the tokens that its rank has between blocks: each column of ranks is a pipeline of its own.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.training.models.gpt import GPT, begins_at, turns_of
from datastore.training.objectives.base import MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.optim import named_state
from datastore.training.parallel.elsewhere import shown
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson, Piece, autocast, filled
from datastore.training.parallel.norm import clip_everywhere, local_part, settle_partial
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.sharded import cut_matrices, mesh_of, plain_loss, shard_blocks, share_weights
from datastore.training.parallel.strategy import Strategy
from datastore.training.run.profile import part

__all__ = ["Part", "Pipeline"]

_EMBEDDING = "model.embed_tokens.weight"


class Part(nn.Module):
    """Some layers of a GPT, under the names that they have there; `columns` ranks have some of the tokens each between blocks."""

    def __init__(self, gpt: GPT, layers: Sequence[int], *, columns: int) -> None:
        super().__init__()
        self.settings, self.shared, self.columns = gpt.settings, gpt.shared, columns
        self.layers = list(layers)
        self.first, self.last = 0 in self.layers, gpt.settings.layers - 1 in self.layers
        whole = gpt.model
        held: dict[str, nn.Module] = {"layers": nn.ModuleDict({str(layer): whole.layers[layer] for layer in layers})}
        if self.first or (self.last and gpt.lm_head is None):
            held = {"embed_tokens": whole.embed_tokens, **held}
        if self.last:
            held["norm"] = whole.norm
        self.model = nn.ModuleDict(held)
        if self.last and gpt.lm_head is not None:
            self.lm_head = gpt.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream behind these layers, or the logits; `x` are token ids, or the residual stream before."""
        tokens = x.shape[1] * (1 if self.first else self.columns)
        turns = turns_of(self.settings, begins_at(self.shared, tokens), tokens, x.device)
        x = self.model["embed_tokens"](x) if self.first else x
        for block in self.model["layers"].children():
            x = block(x, turns, None)
        if not self.last:
            return x
        x = self.model["norm"](x)
        return functional.linear(x, self.get_parameter(_EMBEDDING)) if self.settings.tied else self.lm_head(x)


class Pipeline(Strategy):
    """Parts of the model on ranks that pass on what they make of each piece."""

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        super().__init__(layout, ranks)
        self._mesh = mesh_of(layout, ranks.device)
        self._schedules: dict[tuple[int, int, bool], Any] = {}
        self._shared: nn.Parameter | None = None
        """The embedding, where another rank of the pipeline has it as well."""

    @override
    def distribute(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, GPT):
            raise ConfigError(
                "this model cannot be cut into the parts of a pipeline",
                model=type(model).__name__,
                hint="Leave out the hook that changed it, or use parallel.shard.",
            )
        share_weights(model)
        self._shapes = {name: (one.shape, one.dtype) for name, one in model.state_dict().items()}
        self._trained = [name for name, one in model.named_parameters() if one.requires_grad]
        parts = self.layout.pipeline * self.layout.interleave
        size = model.settings.layers // parts
        self._owner = {name: _part_of(name, size, parts) % self.layout.pipeline for name in self._shapes}
        mine = range(self.place.stage, parts, self.layout.pipeline)
        columns = self.layout.tensor
        if columns > 1:
            cut_matrices(model, self._mesh["tensor"])
        self._parts = {part: Part(model, range(part * size, (part + 1) * size), columns=columns) for part in mine}
        if self.layout.shard > 1:
            for part in self._parts.values():
                shard_blocks(part, self._mesh, self.layout)
        held = [layer for part in self._parts.values() for layer in part.layers]
        self._here = Part(model, held, columns=columns)
        if model.settings.tied:
            pairs = torch.stack([self._ranks_of(0), self._ranks_of(self.layout.pipeline - 1)], dim=1).tolist()
            self._ends, _ = dist.new_subgroups_by_enumeration(pairs)  # type: ignore[no-untyped-call]
            self._shared = dict(self._here.named_parameters()).get(_EMBEDDING)
        return self._here

    @override
    def micro_rows(self, global_batch: int, wanted: int) -> int:
        """Return the same; where there is no wish, a piece for each part."""
        share = self.share(global_batch)
        return min(wanted or -(-share // self.layout.pipeline), share)

    @override
    def passes(self, rows: int, micro_rows: int) -> int:
        """Return the same, filled up to a multiple of the parts: what the schedules want."""
        pieces, stages = -(-rows // micro_rows), self.layout.pipeline
        return -(-pieces // stages) * stages

    @override
    def backward(self, pieces: Sequence[Piece], lesson: Lesson) -> Tensor:
        rows = max(len(piece.rows.tokens) for piece in pieces)
        total = self._run([Piece(filled(piece.rows, rows), piece.share) for piece in pieces], lesson, learn=True)
        settle_partial(self._here.parameters())
        if self._shared is not None and self._shared.grad is not None:
            dist.all_reduce(local_part(self._shared.grad), group=self._ends)
        self._average()
        return total if self.place.tensor == 0 else total * 0.0

    def _run(self, pieces: Sequence[Piece], lesson: Lesson, *, learn: bool) -> Tensor:
        """Send `pieces` through the pipeline; return the sum of their losses, each by its share, on the ranks of the last part."""
        losses: list[Tensor] = []
        self._pieces, self._lesson = pieces, lesson
        schedule = self._schedule(len(pieces), len(pieces[0].rows.tokens), learn=learn)
        inputs = (torch.cat([piece.rows.inputs for piece in pieces]),) if self.place.stage == 0 else ()
        numbers = torch.arange(len(pieces)) if self.place.stage == self.layout.pipeline - 1 else None
        cut_logits = loss_parallel() if self.layout.tensor > 1 else nullcontext()
        with part("forward and backward"), autocast(self.ranks.device, lesson.precision), cut_logits:
            if learn:
                schedule.step(*inputs, target=numbers, losses=losses, return_outputs=False)
            else:
                schedule.eval(*inputs, target=numbers, losses=losses)
        # Not added up in `_loss`, which torch also calls to find out what the messages hold.
        return sum(losses, torch.zeros((), device=self.ranks.device)).detach() / (self.layout.learners * lesson.scale)

    def _loss(self, outputs: Tensor, number: Tensor) -> Tensor:
        """Return what the piece with this `number`, of those under way, adds to the loss."""
        piece = self._pieces[int(number)]
        loss = plain_loss(self._lesson.loss(outputs, piece.rows))
        return loss * (piece.share * self.layout.learners * self._lesson.scale)

    def _schedule(self, pieces: int, rows: int, *, learn: bool) -> Any:
        """Return the schedule for `pieces` of so many rows; made once, as the first step of one settles what its messages hold."""
        key = (pieces, rows, learn)
        if key not in self._schedules:
            count = self.layout.pipeline * self.layout.interleave
            group = self._mesh.get_group("pipeline")
            stages = [
                PipelineStage(part, number, count, self.ranks.device, group=group)
                for number, part in self._parts.items()
            ]
            kind = Schedule1F1B if self.layout.interleave == 1 else ScheduleInterleaved1F1B
            given: Any = stages[0] if self.layout.interleave == 1 else stages
            self._schedules[key] = kind(given, pieces, loss_fn=self._loss, scale_grads=False)
        return self._schedules[key]

    def _average(self) -> None:
        """Average the gradients of the copies of each part, in one message; FSDP2 has done so where it is in use."""
        if self.layout.copies == 1 or self.layout.shard > 1:
            return
        grads = [local_part(one.grad) for one in self._here.parameters() if one.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=self._mesh.get_group("data"))
        flat /= self.layout.copies
        for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    @override
    def evaluate(self, rows: MicroBatch, lesson: Lesson, *, size: int) -> Tensor:
        count = self.layout.pipeline
        each = -(-size // count)
        rows = filled(self.seen(rows), each * count)
        masks = [None] * count if rows.loss_mask is None else list(torch.split(rows.loss_mask, each))
        parts = [MicroBatch(one, mask) for one, mask in zip(torch.split(rows.tokens, each), masks, strict=True)]
        whole = rows.learned
        shares = [
            1.0 / count if one.learned is None or whole is None else one.learned / whole.clamp(min=1) for one in parts
        ]
        loss = self._run([Piece(*both) for both in zip(parts, shares, strict=True)], lesson, learn=False)
        return self.joined(loss, rows)

    @override
    def probe(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        if type(lesson.objective) is not Causal:
            raise ConfigError(
                "a pipeline runs our objective only",
                objective=type(lesson.objective).__name__,
                hint='Set objective.use = "causal", or use parallel.data or parallel.shard.',
            )
        return super().probe(model, lesson, rows)

    @override
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        copies = self.layout.world // self.layout.pipeline
        return clip_everywhere(
            model.parameters(), limit, copies=copies, counted=None if self.place.stage == 0 else self._shared
        )

    @override
    def parameters(self, model: nn.Module) -> int:
        return sum(self._shapes[name][0].numel() for name in self._trained)

    @override
    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        weights, moments = dict(model.state_dict()), named_state(model, optimizer)
        sample = next(iter(moments.values()), {})
        return {
            "model": {name: self._shown(name, weights.get(name), *self._shapes[name]) for name in self._shapes},
            "optim": {
                name: {
                    key: self._shown(
                        name,
                        moments.get(name, {}).get(key),
                        self._shapes[name][0] if one.dim() else one.shape,
                        one.dtype,
                    )
                    for key, one in sample.items()
                }
                for name in self._trained
            },
        }

    def _shown(self, name: str, here: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor as one of all ranks that have it: `here`, or one without an element on this rank."""
        both = name == _EMBEDDING and self._here.settings.tied
        stages = [0, self.layout.pipeline - 1] if both else [self._owner[name]]
        ranks = torch.stack([self._ranks_of(stage) for stage in stages])
        cut = here.device_mesh.shape if isinstance(here, DTensor) else ()  # The others have copies.
        mesh = DeviceMesh(self.ranks.device.type, ranks.view(len(stages), -1, *cut), _init_backend=False)
        return shown(here, shape, dtype, mesh=mesh)

    def _ranks_of(self, stage: int) -> Tensor:
        """Return the ranks that have the parts of `stage`."""
        size = self.layout.world // self.layout.pipeline
        return torch.arange(stage * size, (stage + 1) * size)


def _part_of(name: str, size: int, parts: int) -> int:
    """Return which part has the tensor called `name`, if each has `size` layers."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) // size
    return 0 if name.startswith("model.embed_tokens") else parts - 1

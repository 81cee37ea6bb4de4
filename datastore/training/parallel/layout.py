"""The layout of a run's ranks: how many share what, checked before anything starts, and the place of each rank in it.

Ranks count along five sizes, the last one fastest, so that those that talk most are neighbours:

    pipeline > data > context > shard > tensor
    rank = (((stage x data + copy) x context + slice) x shard + piece) x tensor + column

Ranks that differ in `data` or `shard` read different samples; those that differ in the others only read the same.
So the order of the data depends on data x shard, and on nothing else.

Everything here is arithmetic: a wrong table is refused by the command line, before a process has loaded torch.
"""

from dataclasses import dataclass

from datastore.errors import ConfigError
from datastore.training.settings import ModelSettings, Settings

__all__ = ["Layout", "Place", "check_model", "check_sync", "layout_of"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of the mesh; their product is the number of ranks."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1
    """Parts of the model on each rank of a pipeline."""

    context: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.copies * self.shard * self.tensor * self.pipeline

    @property
    def readers(self) -> int:
        """How many different shares of a batch there are."""
        return self.data * self.shard

    @property
    def copies(self) -> int:
        """How many copies of the model there are."""
        return self.data * self.context

    @property
    def learners(self) -> int:
        """How many ranks have different tokens: over so many a gradient is averaged."""
        return self.copies * self.shard

    @property
    def splits(self) -> bool:
        """Whether some rank has less than the whole model."""
        return self.world > self.copies


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in a layout."""

    layout: Layout
    rank: int

    @property
    def tensor(self) -> int:
        """Which columns it has of a matrix that several ranks multiply."""
        return self.rank % self.layout.tensor

    @property
    def reader(self) -> int:
        """Which share of a batch it reads."""
        layout = self.layout
        piece = self.rank // layout.tensor % layout.shard
        copy = self.rank // (layout.tensor * layout.shard * layout.context) % layout.data
        return copy * layout.shard + piece

    @property
    def slice(self) -> int:
        """Which run of the tokens of each sequence it has."""
        return self.rank // (self.layout.tensor * self.layout.shard) % self.layout.context

    @property
    def stage(self) -> int:
        """Its place in the pipeline."""
        return self.rank // (self.layout.tensor * self.layout.learners)

    @property
    def speaks(self) -> bool:
        """Whether it is the one rank of those that read the same samples whose counts are added up."""
        return self.tensor == 0 and self.slice == 0 and self.stage == self.layout.pipeline - 1


def layout_of(settings: Settings, world: int) -> Layout:
    """Return the layout of a run on `world` ranks.

    Raises:
        ConfigError: the sizes do not multiply to `world`, a size has no meaning for this model, or a rank would have no sample.
    """
    if world < 1:
        raise ConfigError("there must be at least one rank", world=world, hint="Start one process or more.")
    wanted = settings.parallel
    others = wanted.shard * wanted.tensor * wanted.pipeline * wanted.context
    if world % others or wanted.data not in {0, world // others}:
        sizes = {"data": wanted.data, "shard": wanted.shard, "tensor": wanted.tensor, "pipeline": wanted.pipeline}
        sizes |= {} if wanted.context == 1 else {"context": wanted.context}
        raise ConfigError(
            "the sizes in [parallel] do not multiply to the number of ranks",
            world=world,
            **({key: value for key, value in sizes.items() if key != "data" or value}),
            hint=f"Start {others * max(1, wanted.data)} processes, or change the sizes.",
        )
    layout = Layout(
        world // others,
        wanted.shard,
        wanted.tensor,
        wanted.pipeline,
        wanted.interleave if wanted.pipeline > 1 else 1,
        wanted.context,
    )
    if layout.readers > settings.data.global_batch:
        raise ConfigError(
            "more ranks than samples in a batch",
            world=world,
            **({"readers": layout.readers} if layout.readers < world else {}),
            global_batch=settings.data.global_batch,
            hint="Raise data.global_batch, or start fewer processes.",
        )
    if layout.tensor > 1 and settings.train.compile is True:
        raise ConfigError(
            "compiled blocks cannot be cut by tensor parallelism",
            tensor=layout.tensor,
            hint='Set train.compile = "auto" or false: torch 2.13 loses the layout of a gradient between compiled blocks.',
        )
    if settings.optim.use == "muon" and (layout.splits or settings.sync.use == "parameter_server"):
        raise ConfigError(
            "Muon needs the whole of each matrix on a rank",
            **_beyond_data(layout),
            sync=settings.sync.use,
            hint='Use parallel.data alone, or optim.use = "adamw": on shards, torch 2.13 rounds its iteration otherwise.',
        )
    check_sync(settings, layout)
    _check_slices(settings, layout)
    _check_chunks(settings, layout)
    _check_float8(settings, layout)
    if not settings.model.init:  # Else the shape is known later: `check_model` is called again.
        check_model(settings.model, layout, seq_len=settings.data.seq_len)
    return layout


def check_model(model: ModelSettings, layout: Layout, *, seq_len: int) -> None:
    """Raise unless a model of this shape can be taken apart as `layout` says; a vocabulary of 0 is not known yet.

    Raises:
        ConfigError: a size does not divide what it must; the first one.
    """
    parts = layout.pipeline * layout.interleave
    whole = (
        ("tensor", layout.tensor, "model.heads", model.heads),
        ("tensor", layout.tensor, "model.kv_heads", model.key_heads),
        ("tensor", layout.tensor, "model.mlp_width", model.inner_width),
        ("tensor x context", layout.tensor * layout.context, "data.seq_len", seq_len),
        ("tensor", layout.tensor, "model.vocab_size", model.vocab_size),
        ("shard", layout.shard if layout.tensor > 1 else 1, "model.width", model.width),
        ("pipeline x interleave", parts, "model.layers", model.layers),
    )
    for name, size, key, value in whole:
        if value % size:
            raise ConfigError(
                f"{key} is no multiple of {name} in [parallel]",
                **{key.partition(".")[2]: value, "size": size},
                hint=f"Change {key}, or that size.",
            )


def check_sync(settings: Settings, layout: Layout) -> None:
    """Raise unless gradients can be brought together as `[sync]` says where ranks share the work as `layout` says.

    Raises:
        ConfigError: they cannot.
    """
    use = settings.sync.use
    if use == "all_reduce":
        return
    if settings.train.precision == "fp16":
        raise ConfigError(
            "gradients of float16 have a scale that changes, and only all_reduce forgets nothing of the step before",
            use=use,
            hint='Set train.precision = "bf16" or sync.use = "all_reduce".',
        )
    copies, shards = layout.world == layout.data, layout.world == layout.shard
    if use in {"powersgd", "parameter_server", "diloco"} and not copies:
        raise ConfigError(
            f"{use} needs the whole model on every rank",
            **_beyond_data(layout),
            hint="Use parallel.data alone; where parallel.shard is needed, use bf16, int8, int4 or `sync.use=top_k`.",
        )
    if not (copies or shards):
        raise ConfigError(
            "compressed gradients go with parallel.data alone or parallel.shard alone",
            use=use,
            **_beyond_data(layout),
            hint='Use one of them, or sync.use = "all_reduce".',
        )
    if use == "parameter_server" and settings.sync.servers > layout.world:
        raise ConfigError(
            "more parameter servers than ranks",
            servers=settings.sync.servers,
            world=layout.world,
            hint="Lower sync.servers, or start more processes.",
        )


def _check_slices(settings: Settings, layout: Layout) -> None:
    """Refuse what cannot learn from a part of each sequence."""
    if layout.context == 1:
        return
    others = {
        "model": settings.model.use,
        "objective": settings.objective["use"] not in {"causal", "chat"} and settings.objective["use"],
    }
    unfit = {name: value for name, value in others.items() if value}
    if unfit:
        raise ConfigError(
            "a sequence cannot be shared between ranks here",
            context=layout.context,
            **unfit,
            hint="Use parallel.context with our GPT, which learns each next token, or leave it at 1.",
        )


def _check_chunks(settings: Settings, layout: Layout) -> None:
    """Refuse logits that are made some rows at a time where the model does not make them as a whole."""
    if settings.objective["use"] not in {"causal", "chat"} or not settings.objective.get("chunked"):
        return
    others = {
        "tensor": layout.tensor > 1 and layout.tensor,
        "pipeline": layout.pipeline > 1 and layout.pipeline,
        "model": settings.model.use,
    }
    unfit = {name: value for name, value in others.items() if value}
    if unfit:
        raise ConfigError(
            "objective.chunked needs our GPT with its output layer on every rank",
            **unfit,
            hint="Use parallel.data, parallel.shard and parallel.context, or leave out objective.chunked.",
        )


def _check_float8(settings: Settings, layout: Layout) -> None:
    """Refuse fp8 where linear layers are others, and numbers of tokens that its kernels do not take."""
    if not settings.train.precision.startswith("fp8"):
        return
    unfit: dict[str, object] = {} if layout.tensor == 1 else {"tensor": layout.tensor}
    for table in settings.hooks:
        if table["use"] == "quantize" and table.get("qat_from") is not None:
            unfit["quantize"] = f"qat_from = {table['qat_from']}"
        if table["use"] == "adapt" and table.get("base_bits"):
            unfit["adapt"] = f"base_bits = {table['base_bits']}"
    if unfit:
        raise ConfigError(
            "fp8 takes linear layers as they are, not cut, rounded or packed",
            **unfit,
            hint='Leave them out, or set train.precision = "bf16".',
        )
    if settings.data.seq_len % (16 * layout.context):
        raise ConfigError(
            "fp8 needs a number of tokens that is a multiple of 16 on each rank",
            seq_len=settings.data.seq_len,
            **_beyond_data(layout),
            hint="Change `data.seq_len`.",
        )


def _beyond_data(layout: Layout) -> dict[str, int]:
    sizes = {"data": layout.data, "shard": layout.shard, "tensor": layout.tensor, "pipeline": layout.pipeline}
    sizes |= {"context": layout.context}
    return {name: size for name, size in sizes.items() if size > 1}

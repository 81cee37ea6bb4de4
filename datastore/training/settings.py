"""The settings of a training run: one frozen record per part, read from TOML without loading torch.

    [data] which tokens, in which order, and what is held back for validation; [model] the shape of the GPT; [optim] update rule, schedule
    [train] steps; [parallel] how ranks share the work; [sync] how they bring their gradients together; [loader] its memory and threads
    [checkpoint] [eval] [faults] [metrics] what is kept, looked after and reported; [objective] what is learned, and [[hooks]] in the order in which they run: `use` names one, which owns the other keys

Every value has a default except `data.url`, or `[data.sources.NAME]` where there are several. A value that depends on the machine may be "auto"; the record of the session says what it became.
"""

from typing import Annotated, Any, Literal

import msgspec
from typing_extensions import override

from datastore.checkpoint.codec import Codec
from datastore.document import Count, Positive, Rate, SettingsDocument
from datastore.loader.settings import LoaderSettings

__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "EvalSettings",
    "FaultSettings",
    "MetricsSettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "Settings",
    "SourceSettings",
    "StageSettings",
    "StepSettings",
    "SyncSettings",
]


class SourceSettings(SettingsDocument, frozen=True, kw_only=True):
    """One dataset of several that are trained on together."""

    url: Annotated[str, msgspec.Meta(min_length=1)]
    """A tokenized dataset, as `data.url`."""

    weight: Rate | None = None
    """Its share of the samples, beside those of the others. None, for all sources: as many samples as each has, times `epochs`."""

    epochs: Rate | None = None
    """How often to go through it at most; then the others share what it had."""


class StageSettings(SettingsDocument, frozen=True, kw_only=True):
    """Other weights from a sample on."""

    start: Positive
    """Samples that came before."""

    weights: dict[str, Rate]
    """By source; one that is not named is left out."""


class DataSettings(SettingsDocument, frozen=True, kw_only=True):
    """The training stream and what is held back from it."""

    url: str = ""
    """A tokenized dataset; `URL@version` and `URL@tag` pin one version, else the newest is pinned when the run begins. Or else `sources`."""

    sources: dict[str, SourceSettings] = msgspec.field(default_factory=dict)
    """Several datasets by name, tables `[data.sources.NAME]`; see [mix datasets by weight](howto/mixtures.md#in-a-training-run)."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Of `sources`: weights are raised to the power of 1 / temperature."""

    stages: tuple[StageSettings, ...] = ()
    """Of `sources`: tables `[[data.stages]]` with other weights from the sample `start` on, in order."""

    seq_len: Positive = 1024
    """Tokens that the model sees at once; a sample has one more."""

    global_batch: Positive = 64
    """Samples in one step over all ranks; need not be a multiple of anything."""

    seed: Count = 0
    """Seed of the order."""

    validation: str = ""
    """Another dataset with the same tokenizer, used for validation only. Empty: `holdout` decides."""

    holdout: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.01
    """Fraction of the tokens, the last ones that were ingested, that is never trained on; of each source. Not used with `validation`."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.url) == bool(self.sources):
            raise ValueError("name one dataset as data.url, or several as [data.sources.NAME]")
        if len({source.weight is None for source in self.sources.values()}) > 1:
            raise ValueError("give a weight to every source, or to none")


class ModelSettings(SettingsDocument, frozen=True, kw_only=True):
    """The shape of the GPT. The default has 26 M parameters besides the embedding."""

    use: str = ""
    """A model of `transformers`: `hf:FOLDER`, or `hf:config.json`; the settings below are not used then. Empty: our GPT."""

    init: str = ""
    """Weights to begin with: those of a run (`RUN`, `RUN@STEP`), or of a Hugging Face folder. Their shape comes with them."""

    layers: Positive = 8
    """Blocks of attention and feed-forward, one after the other."""

    width: Positive = 512
    """Numbers that stand for a token between blocks."""

    heads: Positive = 8
    """Query heads."""

    head_width: Count = 0
    """Numbers of a head, an even number; 0: `width / heads`."""

    kv_heads: Count = 0
    """Heads of keys and values, each shared by `heads / kv_heads` query heads; 0: as many as `heads`."""

    mlp_width: Count = 0
    """Inner width of the feed-forward part; 0: 8/3 of `width`, rounded up to a multiple of 64."""

    vocab_size: Count = 0
    """0: that of the dataset's tokenizer."""

    tied: bool = True
    """Whether the output layer is the transposed embedding."""

    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 10_000.0
    """Base of the rotary embedding: the longest wave has about 6 times so many tokens."""

    norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-5
    """Added to the mean square in each RMSNorm."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use and self.init:
            raise ValueError("leave out model.init: model.use brings its weights")
        if (not self.head_width and self.width % self.heads) or self.head_size % 2:
            raise ValueError("width / heads must be a whole, even number, or head_width an even one")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values, the default resolved."""
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        """Numbers of a head, the default resolved."""
        return self.head_width or self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Width inside the feed-forward part, the default resolved."""
        return self.mlp_width or (self.width * 8 // 3 + 63) // 64 * 64


class OptimSettings(SettingsDocument, frozen=True, kw_only=True):
    """The update rule, and a learning rate that warms up linearly and falls along a cosine."""

    use: Literal["adamw", "muon", "sgd"] = "adamw"
    """The update rule, as torch has it. muon moves the matrices within blocks, and AdamW the rest, both by `lr`."""

    init: bool = False
    """Begin with the moments of the run that `model.init` names, cut as its weights are; false: with none."""

    lr: Annotated[float, msgspec.Meta(gt=0)] = 6e-4
    """Peak learning rate."""

    warmup: Count = 100
    """Steps until the peak."""

    floor: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """Learning rate of the last step, as a fraction of `lr`."""

    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """How slowly AdamW's means forget: that of the gradients, and that of their squares."""

    eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-8
    """Added to the denominator of AdamW."""

    weight_decay: Rate = 0.1
    """Applied to matrices only."""

    clip: Rate = 1.0
    """Largest norm of the gradient; 0: never clip."""


class StepSettings(SettingsDocument, frozen=True, kw_only=True):
    """How many steps, and how this machine takes them."""

    steps: Positive = 1000
    """Steps of the whole run; a resumed run may have more."""

    seed: Count = 0
    """Seed of the initial weights and of everything random in a step."""

    micro_batch: Count = 0
    """Samples per forward pass of one rank; gradients are accumulated. 0: all of the rank's samples at once."""

    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8", "fp8_emulated"] = "auto"
    """Of activations; weights stay float32. auto: bf16 where the device has it. fp16 scales the loss, for the whole run. See [fp8](trainer.md#fp8)."""

    fp8_scales: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Of fp8: a scale for each matrix, or for each row and column: closer, and slower."""

    compile: bool | Literal["auto"] = "auto"
    """`torch.compile` for each block. auto: on a GPU only. On a CPU a step of 8.4 M parameters takes 5 % less, compiled for half a minute."""

    recompute: bool = False
    """Keep only the input of each block and compute the rest of it again in the backward pass: less memory, a third more time."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on a GPU if there is one."""

    threads: Count = 0
    """CPU threads of each rank; 0: the cores of the machine over its ranks. The count is recorded: it can change the last bit of a sum."""

    deterministic: bool = True
    """Use kernels that give the same bits each time. On a GPU a step may take a few per cent longer."""

    timeout_s: Positive = 600
    """How long a rank waits for the others before it gives up."""


class ParallelSettings(SettingsDocument, frozen=True, kw_only=True):
    """How the ranks share the work: the sizes of the mesh, whose product is the number of ranks. See [parallelism](parallelism.md)."""

    data: Count = 0
    """Groups of ranks that read different samples and have the same weights; 0: as many as the other sizes leave."""

    shard: Positive = 1
    """Ranks over which FSDP2 spreads every parameter, its gradient and its moments; they read different samples, too."""

    tensor: Positive = 1
    """Ranks that multiply one matrix together, and read the same samples."""

    pipeline: Positive = 1
    """Ranks of which each has some of the layers."""

    interleave: Positive = 1
    """Parts of the model that each rank of a pipeline has: fewer idle ranks, more messages."""

    context: Positive = 1
    """Ranks that share each sequence: some of its tokens each, and the same weights."""


class SyncSettings(SettingsDocument, frozen=True, kw_only=True):
    """How ranks that read different samples bring together what they learn. See [gradient synchronization](howto/gradient-sync.md)."""

    use: Literal["all_reduce", "bf16", "int8", "int4", "powersgd", "top_k", "parameter_server", "diloco"] = "all_reduce"
    """all_reduce: the mean of all gradients. bf16 to top_k: in fewer bytes. parameter_server: some ranks own the parameters. diloco: rounds."""

    rank: Positive = 16
    """Of powersgd: columns of the thin matrices of which a matrix is the product."""

    keep: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    """Of top_k: the part of the values that is sent."""

    servers: Positive = 1
    """Of parameter_server: ranks that own parameters, and move them; they read samples, too."""

    staleness: Count = 0
    """Of parameter_server: by how many steps a gradient is late; messages have so long to arrive."""

    every: Positive = 30
    """Of diloco: steps of a round, which each rank takes by itself."""

    outer_lr: Annotated[float, msgspec.Meta(gt=0)] = 0.7
    """Of diloco: how far the weights go along what the ranks have learned in a round."""

    outer_momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    """Of diloco: Nesterov's, from round to round."""

    deltas: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Of diloco: how a round's changes are sent."""


class CheckpointSettings(SettingsDocument, frozen=True, kw_only=True):
    """When training state is saved. The last step, and the step at which a signal stops the run, are saved in any case."""

    every: Count = 500
    """Steps between checkpoints; 0: only at the end."""

    keep: Positive = 3
    """Newest checkpoints that are kept."""

    keep_every: Count = 0
    """Checkpoints of steps that are a multiple of this are kept, too; 0: none."""

    keep_best: Count = 0
    """As many checkpoints with the least validation loss are kept, too, of those that were saved just after it was measured."""

    replica: str = ""
    """A folder or URL where each checkpoint is copied while training goes on, with what else the run has; as many are kept there."""

    codec: Codec = "none"
    """How checkpoints are stored in the run: `zstd` takes 0.68 to 0.85 of the bytes, where the place takes less than some 1 GB/s."""

    replica_codec: Codec = "none"
    """The same for the copies in `replica`."""


class EvalSettings(SettingsDocument, frozen=True, kw_only=True):
    """When the validation loss is measured."""

    every: Count = 250
    """Steps between evaluations, besides one at the end; 0: never."""

    samples: Positive = 256
    """Validation samples, the same ones each time."""


class FaultSettings(SettingsDocument, frozen=True, kw_only=True):
    """What becomes of a step with a bad gradient, and of a run that has lost a rank. See [faults](howto/faults.md)."""

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A gradient that is not finite: the run ends; the weights stay as they are; or they go back to the last checkpoint."""

    spike: Literal["off", "stop", "skip", "rewind"] = "off"
    """A gradient that is far larger than usual: the same."""

    spike_times: Annotated[float, msgspec.Meta(gt=1)] = 10.0
    """So many times the usual norm is a spike."""

    most: Positive = 10
    """Bad steps in a row; one more ends the run."""

    restarts: Count = 0
    """How often ranks that were started with `--processes` are started again after one has died."""


class MetricsSettings(SettingsDocument, frozen=True, kw_only=True):
    """Where metrics go besides `metrics/*.jsonl` in the run folder."""

    tensorboard: bool = False
    """Also write TensorBoard event files to `tensorboard/` in the run folder (extra `track`; the folder must be local)."""

    trackers: tuple[dict[str, Any], ...] = ()
    """Where numbers go, too: tables `[[metrics.trackers]]`, of which `use` names a tracker, its other keys are its own."""

    profile: str = ""
    """Steps to look at closely, such as `10:13`: a trace of each rank for Perfetto, in `profile/`, and a table of where a step goes."""


class Settings(SettingsDocument, frozen=True, kw_only=True):
    """All settings of a run, by table: `data`, `model`, `optim`, `train`, `parallel`, `sync`, `checkpoint`, `eval`, `faults`, `metrics`, `loader`."""

    data: DataSettings
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    train: StepSettings = StepSettings()
    parallel: ParallelSettings = ParallelSettings()
    sync: SyncSettings = SyncSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    faults: FaultSettings = FaultSettings()
    metrics: MetricsSettings = MetricsSettings()
    loader: LoaderSettings = LoaderSettings()
    objective: dict[str, Any] = msgspec.field(default_factory=lambda: {"use": "causal"})
    """What is learned: `use` names it, causal if it is left out; its other keys are its own."""

    hooks: tuple[dict[str, Any], ...] = ()
    """What changes the model or its training, in the order in which they run: `use` names each, its other keys are its own."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if "use" not in self.objective:
            msgspec.structs.force_setattr(self, "objective", {"use": "causal"} | self.objective)
        if self.loader.epochs is not None:
            raise ValueError("loader.epochs cannot be set: training is endless, train.steps ends it")
        if not all(isinstance(one.get("use"), str) for one in (self.objective, *self.hooks, *self.metrics.trackers)):
            raise ValueError('[objective], [[hooks]], [[metrics.trackers]]: each needs use = "name" or "module:Class"')

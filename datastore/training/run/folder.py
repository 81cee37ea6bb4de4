"""A run folder: one URL with what a run is, what it did, and everything that is needed to go on.

config.json               settings, dataset and version; written by the first session
sessions/<session>.json   one per start or resume: who, where, from which step, with what resolved from "auto"
consumed/ metrics/        what was consumed, what it was like
lock/                     who writes now
run.json parts/ steps/ refs/   checkpoints, see `datastore.checkpoint`
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any

import msgspec

from datastore.checkpoint.steps import reading
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.document import Sealed, decode, encode, seal, unseal
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError, ResumeError
from datastore.host import utc_now
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.urls import strip_credentials
from datastore.training.run.changes import HooksByPlace, changed_hooks, changed_keys, flatten, hooks_by_place
from datastore.training.run.data import DatasetRef, Versions, open_at, ref_of, version_to_read
from datastore.training.run.split import Split, make_split, mix_split
from datastore.training.settings import Settings

if TYPE_CHECKING:
    from datastore.training.objectives.base import Objective

__all__ = [
    "CONFIG_KEY",
    "RunConfig",
    "RunFolder",
    "RunSession",
    "decode_config",
    "encode_config",
    "is_run",
    "new_session",
    "open_split",
    "own_versions",
    "versions_to_read",
]

CONFIG_KEY = "config.json"

_NO_RUN = (
    "Start one with `datastore train`.",
    "What lies there are checkpoints of another loop: `datastore checkpoint export --as torch`, `safetensors` or `dcp` takes them.",
)
_LOGGER = getLogger(__name__)

HookTables = Sequence[Mapping[str, Any]]


class RunConfig(Sealed, frozen=True, kw_only=True):
    """`config.json`: what a run is. Only settings that may change are ever changed in it."""

    settings: Settings
    dataset: DatasetRef | None = None
    """What it began with; None: there are several."""

    sources: Mapping[str, DatasetRef] = msgspec.field(default_factory=dict)
    """What it began with, or added, by name."""

    validation: DatasetRef | None = None
    """The dataset named by `data.validation`."""

    vocab_size: int
    end_of_text: int | None = None
    architecture: dict[str, Any] = msgspec.field(default_factory=dict)
    """The config of a model of `transformers` that `model.use` named; empty: it is one of ours."""

    created: str
    """UTC, ISO 8601."""


class RunSession(Sealed, frozen=True, kw_only=True):
    """`sessions/<session>.json`: one process group that worked on a run."""

    session: str
    started: str
    """UTC, ISO 8601."""

    from_step: int
    """The step it went on from; 0: from the beginning."""

    world: int
    host: str
    device: str
    precision: str
    compiled: bool
    threads: int
    versions: dict[str, str]
    """Of datastore, torch and Python."""

    data: Versions | None = None
    """Versions of the datasets that it reads; None: those of the config."""

    loader: dict[str, Any] = msgspec.field(default_factory=dict)
    """State of the loader at its start, where that says more than where it stood: of a mixture."""

    number: int = 0
    """1 for the first session of a run, and one more for each; 0: not noted yet."""

    changed: dict[str, tuple[Any, Any]] = msgspec.field(default_factory=dict)
    """Settings that it changed, by their path: what each was in the session before, and is from here on."""


def new_session() -> str:
    """Return a name that no other session has; names sort by time."""
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Access to one run folder; reading needs no lock."""

    storage: Storage

    @staticmethod
    def open(url: str) -> "RunFolder":
        """Return the folder at `url`; nothing is read yet."""
        return RunFolder(open_storage(url))

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        return self.storage.url

    def config(self) -> RunConfig:
        """Return what the run is.

        Raises:
            MissingError: there is no run.
            FormatError, CorruptError: it was written by a newer version, or is damaged.
        """
        try:
            raw = self.storage.get(CONFIG_KEY)
        except MissingError:
            raise MissingError("there is no run", url=self.url, hint=_NO_RUN[self.has_checkpoint()]) from None
        return unseal(RunConfig, raw, where=f"{self.url}/{CONFIG_KEY}")

    def has_checkpoint(self) -> bool:
        """Return whether a step of the run is stored."""
        return next(iter(self.storage.list("steps")), None) is not None

    def begin(self, settings: Settings, *, kept: Callable[[HookTables], HooksByPlace] = hooks_by_place) -> RunConfig:
        """Return the config of a run that may be new; nothing is written yet.

        A run without a checkpoint has learned nothing, so it may still become another one.

        Raises:
            ResumeError: the folder belongs to a run with other settings, or another dataset; the message names them.
            ConfigError: the folder holds something else, or a setting does not fit the dataset.
        """
        if is_run(self.storage):
            if self.has_checkpoint():
                return self.again(settings, kept=kept)
        else:
            foreign = next((found.key for found in self.storage.list() if not found.key.startswith("lock/")), None)
            if foreign is not None:
                hint = "Name another folder."
                raise ConfigError("the folder is not empty, and holds no run", url=self.url, found=foreign, hint=hint)
        return _new_config(settings)

    def again(self, settings: Settings, *, kept: Callable[[HookTables], HooksByPlace] = hooks_by_place) -> RunConfig:
        """Return the config of a run that exists, its changeable settings replaced by those of `settings`.

        `kept` says what of its hooks must not change; as a rule, all of them.

        Raises:
            MissingError: there is no run.
            ResumeError: as `begin`.
        """
        config = self.config()
        differ = set(changed_keys(config.settings, settings))
        if "hooks" in differ:
            differ = differ - {"hooks"} | changed_hooks(kept(config.settings.hooks), kept(settings.hooks))
        if differ:
            raise ResumeError(
                "the run was started with other settings",
                differ=sorted(differ),
                run=self.url,
                hint="Give it the old settings, or start another run.",
            )
        sources = {
            name: config.sources.get(name) or ref_of(open_dataset(one.url))
            for name, one in settings.data.sources.items()
        }
        return msgspec.structs.replace(config, settings=_without_secrets(settings), sources=sources)

    def changes(self, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Return the settings that `config` changes, by their path, each as it was and as it is."""
        try:
            before = flatten(self.config().settings)
        except MissingError:
            return {}
        return {key: (before[key], value) for key, value in flatten(config.settings).items() if before[key] != value}

    def store(self, config: RunConfig) -> None:
        """Make `config` that of the run; only the holder of the lock may."""
        self.storage.put(CONFIG_KEY, seal(config))

    def add_session(self, session: RunSession) -> None:
        """Store the record of a session that begins to take steps."""
        self.storage.put(f"sessions/{session.session}.json", seal(session))

    def threads_before(self, world: int) -> int:
        """Return how many threads the last session with as many ranks gave each; 0 if there was none that can be read."""
        return next((session.threads for session in reversed(self.sessions()) if session.world == world), 0)

    def sessions(self) -> list[RunSession]:
        """Return the records of all sessions that can be read, oldest first.

        They are sorted by their numbers, as the clocks of two machines may differ.
        """
        found = []
        for one in self.storage.list("sessions"):
            try:
                with reading(one.key):
                    raw = self.storage.get(one.key)
                found.append(unseal(RunSession, raw, where=one.key))
            except (CorruptError, FormatError) as error:
                _LOGGER.warning("a session of the run cannot be read and is passed over: %s", error)
        return sorted(found, key=lambda session: (session.number, session.session))

    def session(self, name: str) -> RunSession:
        """Return the record of one session."""
        key = f"sessions/{name}.json"
        return unseal(RunSession, self.storage.get(key), where=key)


def is_run(storage: Storage) -> bool:
    """Whether a run lies there, sound or damaged, rather than nothing or a Hugging Face folder, which has a config.json too."""
    try:
        raw = storage.get(CONFIG_KEY)
    except MissingError:
        return False
    return (
        b'"model_type"' not in raw or b'"architecture":' in raw
    )  # Of a run with a model of theirs; they say `architectures`.


def own_versions(config: RunConfig) -> Versions:
    """Return the versions that a run began with."""
    return Versions(
        training=config.dataset.version if config.dataset is not None else 0,
        validation=config.validation.version if config.validation is not None else 0,
        sources={name: ref.version for name, ref in config.sources.items()},
    )


def versions_to_read(config: RunConfig) -> Versions:
    """Return which versions of its datasets a run reads when it goes on now; see `data.py`.

    Raises:
        MissingError: a dataset is not there any more.
    """
    data, mode = config.settings.data, config.settings.loader.deletions
    own, other = config.dataset, config.validation
    return Versions(
        sources={
            name: version_to_read(data.sources[name].url, ref, deletions=mode) for name, ref in config.sources.items()
        },
        training=version_to_read(data.url, own, deletions=mode) if own is not None else 0,
        validation=version_to_read(data.validation, other, deletions=mode) if other is not None else 0,
    )


def open_split(config: RunConfig, versions: Versions | None = None) -> Split:
    """Return the datasets of a run, at `versions`, or at those that it reads when it goes on now.

    Raises:
        MissingError: a dataset or version is not there any more.
        ResumeError: another dataset lies at its URL, or a version has other shards.
    """
    data, other = config.settings.data, config.validation
    versions = versions or versions_to_read(config)
    validation = None
    if other is not None:
        validation = open_at(data.validation, other, version=versions.validation or other.version)
    if config.dataset is not None:
        dataset = open_at(data.url, config.dataset, version=versions.training)
        return make_split(dataset, holdout=data.holdout, validation=validation)
    dropped = sorted(set(versions.sources) - set(config.sources))
    if dropped:
        raise ConfigError(
            "the run has dropped a source that it read then",
            sources=dropped,
            hint="Add it to the settings, with weight = 0.",
        )
    datasets = {
        name: open_at(data.sources[name].url, config.sources[name], version=version)
        for name, version in versions.sources.items()
    }
    return mix_split(datasets, data=data, validation=validation)


def encode_config(config: RunConfig) -> str:
    """Return `config` as text that `decode_config` reads: rank 0 hands it to the others."""
    return encode(config).decode()


def decode_config(text: str) -> RunConfig:
    """Return what `encode_config` was given."""
    return decode(RunConfig, text.encode(), where="rank 0")


def _new_config(settings: Settings) -> RunConfig:
    from datastore.training.models.huggingface import read_architecture  # noqa: PLC0415 - they load torch
    from datastore.training.objectives.catalog import make_objective  # noqa: PLC0415

    data = settings.data
    urls = {name: source.url for name, source in data.sources.items()} or {"": data.url}
    datasets = {name: open_dataset(url) for name, url in urls.items()}
    objective = make_objective(settings.objective)
    for dataset in datasets.values():
        _check_kind(dataset, objective)
    validation = open_dataset(data.validation) if data.validation else None
    if data.sources:
        mix_split(datasets, data=data, validation=validation)
    else:
        make_split(datasets[""], holdout=data.holdout, validation=validation)
    tokenizer = next((one.commit.tokenizer for one in datasets.values() if one.commit.tokenizer), None)
    known = max(tokenizer.vocab_size if tokenizer else 0, objective.vocabulary)
    architecture = read_architecture(settings.model.use) if settings.model.use else {}
    vocab_size = settings.model.vocab_size or int(architecture.get("vocab_size", 0)) or known
    if vocab_size < known or not vocab_size:
        raise ConfigError(
            "the vocabulary does not cover the dataset's tokens",
            vocab_size=vocab_size,
            needed=known,
            hint="Set model.vocab_size to that or more; 0 takes what is needed, or what the config of the model has.",
        )
    refs = {name: ref_of(dataset) for name, dataset in datasets.items()}
    return RunConfig(
        settings=_without_secrets(settings),
        dataset=refs.pop("", None),
        sources=refs,
        validation=ref_of(validation) if validation is not None else None,
        vocab_size=vocab_size,
        end_of_text=tokenizer.end_of_text if tokenizer else None,
        architecture=architecture,
        created=utc_now(),
    )


def _check_kind(dataset: Dataset, objective: "Objective") -> None:
    if dataset.kind == objective.reads:
        return
    if objective.reads == "tokens":
        raise ConfigError(
            "the dataset holds text, not tokens",
            url=dataset.url,
            hint="Ingest it with --tokenizer to train on it, or name an objective that learns from records.",
        )
    raise ConfigError(
        f"the dataset holds {dataset.kind}, and the objective learns from records",
        url=dataset.url,
        objective=type(objective).__name__,
        hint="Name another objective.use, or a dataset of records.",
    )


def _without_secrets(settings: Settings) -> Settings:
    """Return `settings` as they are stored: URLs without passwords and signatures."""
    data = settings.data
    sources = {
        name: msgspec.structs.replace(source, url=strip_credentials(source.url))
        for name, source in data.sources.items()
    }
    data = msgspec.structs.replace(
        data, url=strip_credentials(data.url), validation=strip_credentials(data.validation), sources=sources
    )
    return msgspec.structs.replace(settings, data=data)

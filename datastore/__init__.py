"""The storage layer under language-model training: text in, batches out, checkpoints kept.

Every public name loads when it is first used, so `import datastore` costs a millisecond and brings neither torch nor
pyarrow. The price is this list, written twice: once for the interpreter, once for type checkers. A test compares them.

No name here may be that of a submodule (`ingest`, `train`, `checkpoint`): importing the submodule would replace it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.checkpoint.checkpointer import Checkpointer
    from datastore.checkpoint.settings import Keep
    from datastore.config import load_settings
    from datastore.errors import (
        ConfigError,
        ConflictError,
        CorruptError,
        DatastoreError,
        DependencyError,
        FormatError,
        MissingError,
        RejectedError,
        ResumeError,
        StorageError,
        WaitError,
    )
    from datastore.ingest.importing import import_dataset
    from datastore.ingest.ingest import ingest as ingest_files
    from datastore.ingest.settings import IngestSettings
    from datastore.ingest.tokenizer import TokenizerSettings, train_tokenizer
    from datastore.ingest.tokenwriter import token_writer
    from datastore.interop.export import export as export_dataset
    from datastore.loader.batch import Batch
    from datastore.loader.loader import Loader
    from datastore.loader.place import Place
    from datastore.loader.settings import LoaderOptions
    from datastore.storage.resolve import open_storage
    from datastore.store.clone import clone
    from datastore.store.compact import compact
    from datastore.store.copy import copy
    from datastore.store.dataset import Dataset
    from datastore.store.dataset import open_dataset as open  # noqa: A004 - `ds.open` is what it is
    from datastore.store.delete import delete
    from datastore.store.diff import diff
    from datastore.store.evolve import evolve
    from datastore.store.expire import expire
    from datastore.store.exposure import exposure
    from datastore.store.protect import protect
    from datastore.store.purge import purge
    from datastore.store.records import writer
    from datastore.store.repair import repair
    from datastore.store.roots import place_dataset as place
    from datastore.store.tags import set_tag
    from datastore.store.vacuum import vacuum
    from datastore.store.verify import verify
    from datastore.train.export import export as export_model
    from datastore.train.generate import generate
    from datastore.train.proof import prove as prove_run
    from datastore.train.settings import Settings as RunSettings
    from datastore.train.trace import trace as trace_step
    from datastore.train.trainer import resume as resume_run
    from datastore.train.trainer import train as train_run
    from datastore.train.validation import evaluate

_HOMES = {
    "Batch": ("datastore.loader.batch", "Batch"),
    "Checkpointer": ("datastore.checkpoint.checkpointer", "Checkpointer"),
    "ConfigError": ("datastore.errors", "ConfigError"),
    "ConflictError": ("datastore.errors", "ConflictError"),
    "CorruptError": ("datastore.errors", "CorruptError"),
    "Dataset": ("datastore.store.dataset", "Dataset"),
    "DatastoreError": ("datastore.errors", "DatastoreError"),
    "DependencyError": ("datastore.errors", "DependencyError"),
    "FormatError": ("datastore.errors", "FormatError"),
    "IngestSettings": ("datastore.ingest.settings", "IngestSettings"),
    "Keep": ("datastore.checkpoint.settings", "Keep"),
    "Loader": ("datastore.loader.loader", "Loader"),
    "LoaderOptions": ("datastore.loader.settings", "LoaderOptions"),
    "MissingError": ("datastore.errors", "MissingError"),
    "Place": ("datastore.loader.place", "Place"),
    "RejectedError": ("datastore.errors", "RejectedError"),
    "ResumeError": ("datastore.errors", "ResumeError"),
    "RunSettings": ("datastore.train.settings", "Settings"),
    "StorageError": ("datastore.errors", "StorageError"),
    "TokenizerSettings": ("datastore.ingest.tokenizer", "TokenizerSettings"),
    "WaitError": ("datastore.errors", "WaitError"),
    "clone": ("datastore.store.clone", "clone"),
    "compact": ("datastore.store.compact", "compact"),
    "copy": ("datastore.store.copy", "copy"),
    "delete": ("datastore.store.delete", "delete"),
    "diff": ("datastore.store.diff", "diff"),
    "evaluate": ("datastore.train.validation", "evaluate"),
    "evolve": ("datastore.store.evolve", "evolve"),
    "expire": ("datastore.store.expire", "expire"),
    "export_dataset": ("datastore.interop.export", "export"),
    "export_model": ("datastore.train.export", "export"),
    "exposure": ("datastore.store.exposure", "exposure"),
    "generate": ("datastore.train.generate", "generate"),
    "import_dataset": ("datastore.ingest.importing", "import_dataset"),
    "ingest_files": ("datastore.ingest.ingest", "ingest"),
    "load_settings": ("datastore.config", "load_settings"),
    "open": ("datastore.store.dataset", "open_dataset"),
    "open_storage": ("datastore.storage.resolve", "open_storage"),
    "place": ("datastore.store.roots", "place_dataset"),
    "protect": ("datastore.store.protect", "protect"),
    "prove_run": ("datastore.train.proof", "prove"),
    "purge": ("datastore.store.purge", "purge"),
    "repair": ("datastore.store.repair", "repair"),
    "resume_run": ("datastore.train.trainer", "resume"),
    "set_tag": ("datastore.store.tags", "set_tag"),
    "token_writer": ("datastore.ingest.tokenwriter", "token_writer"),
    "trace_step": ("datastore.train.trace", "trace"),
    "train_run": ("datastore.train.trainer", "train"),
    "train_tokenizer": ("datastore.ingest.tokenizer", "train_tokenizer"),
    "vacuum": ("datastore.store.vacuum", "vacuum"),
    "verify": ("datastore.store.verify", "verify"),
    "writer": ("datastore.store.records", "writer"),
}
"""Where each public name is defined, and what it is called there."""

__all__ = [
    "Batch",
    "Checkpointer",
    "ConfigError",
    "ConflictError",
    "CorruptError",
    "Dataset",
    "DatastoreError",
    "DependencyError",
    "FormatError",
    "IngestSettings",
    "Keep",
    "Loader",
    "LoaderOptions",
    "MissingError",
    "Place",
    "RejectedError",
    "ResumeError",
    "RunSettings",
    "StorageError",
    "TokenizerSettings",
    "WaitError",
    "clone",
    "compact",
    "copy",
    "delete",
    "diff",
    "evaluate",
    "evolve",
    "expire",
    "export_dataset",
    "export_model",
    "exposure",
    "generate",
    "import_dataset",
    "ingest_files",
    "load_settings",
    "open",
    "open_storage",
    "place",
    "protect",
    "prove_run",
    "purge",
    "repair",
    "resume_run",
    "set_tag",
    "token_writer",
    "trace_step",
    "train_run",
    "train_tokenizer",
    "vacuum",
    "verify",
    "writer",
]


def __getattr__(name: str) -> Any:
    """Return a public name, imported now (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("datastore")
    if name not in _HOMES:
        raise AttributeError(f"module 'datastore' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The storage layer under language-model training: text in, batches out, checkpoints kept.

Every public name loads when it is first used, so `import datastore` costs a millisecond and brings neither torch nor
pyarrow. The price is this list, written twice: once for the interpreter, once for type checkers. A test compares them.

No name here may be that of a submodule (`ingest`, `train`, `checkpoint`): importing the submodule would replace it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.checkpoint.checkpointer import Checkpointer
    from datastore.checkpoint.exchange.dcp import DcpReader, DcpWriter
    from datastore.checkpoint.items import PerRank
    from datastore.checkpoint.keeping import Keep
    from datastore.checkpoint.places.memory import MemoryCheckpointer
    from datastore.checkpoint.places.two import TwoPlaces
    from datastore.checkpoint.replica import replicate
    from datastore.checkpoint.steps import CheckpointerSettings
    from datastore.config import load_settings
    from datastore.dataset.card import card
    from datastore.dataset.diff import diff
    from datastore.dataset.durability.health import health
    from datastore.dataset.durability.parity import protect
    from datastore.dataset.durability.repair import repair
    from datastore.dataset.durability.verify import verify
    from datastore.dataset.log.tags import set_tag
    from datastore.dataset.operations.clone import clone
    from datastore.dataset.operations.compact import compact
    from datastore.dataset.operations.copy import copy
    from datastore.dataset.operations.delete import delete
    from datastore.dataset.operations.evolve import evolve
    from datastore.dataset.operations.expire import expire
    from datastore.dataset.operations.purge.purge import purge
    from datastore.dataset.operations.undelete import undelete
    from datastore.dataset.operations.vacuum import vacuum
    from datastore.dataset.roots import place_dataset as place
    from datastore.dataset.snapshot import Dataset
    from datastore.dataset.snapshot import open_dataset as open  # noqa: A004 - `ds.open` is what it is
    from datastore.engines.engine import Engine
    from datastore.engines.local import LocalEngine
    from datastore.engines.ray import RayEngine
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
    from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
    from datastore.ingestion.importing import import_dataset, retokenize
    from datastore.ingestion.ingest import ingest
    from datastore.ingestion.quality.similar import DedupSettings
    from datastore.ingestion.quality.similar import deduplicate as dedup
    from datastore.ingestion.report import rejected_records
    from datastore.ingestion.settings import IngestSettings
    from datastore.ingestion.writers.records import record_writer
    from datastore.ingestion.writers.tokens import token_writer
    from datastore.interop.export import export as export_dataset
    from datastore.loader.batch import Batch
    from datastore.loader.loader import Loader
    from datastore.loader.mixture.request import Mixture, Stage
    from datastore.loader.rows.batch import RowBatch, Rows
    from datastore.loader.rows.files.opening import FileRows, open_files
    from datastore.loader.rows.loader import RowLoader
    from datastore.loader.rows.sampling import Stratified, Weighted
    from datastore.loader.settings import LoaderSettings, Rank
    from datastore.storage.resolve import open_storage
    from datastore.training.export.export import export as export_model
    from datastore.training.export.inference import Sampling, evaluate, generate
    from datastore.training.export.teaching import teach
    from datastore.training.run.audit import trace
    from datastore.training.run.history import plot
    from datastore.training.run.proof import prove
    from datastore.training.settings import Settings as RunSettings
    from datastore.training.start import compress, dry_run, fork, resume, train

_HOMES = {
    "Batch": ("datastore.loader.batch", "Batch"),
    "Checkpointer": ("datastore.checkpoint.checkpointer", "Checkpointer"),
    "CheckpointerSettings": ("datastore.checkpoint.steps", "CheckpointerSettings"),
    "ConfigError": ("datastore.errors", "ConfigError"),
    "ConflictError": ("datastore.errors", "ConflictError"),
    "CorruptError": ("datastore.errors", "CorruptError"),
    "DcpReader": ("datastore.checkpoint.exchange.dcp", "DcpReader"),
    "DcpWriter": ("datastore.checkpoint.exchange.dcp", "DcpWriter"),
    "Dataset": ("datastore.dataset.snapshot", "Dataset"),
    "DatastoreError": ("datastore.errors", "DatastoreError"),
    "DedupSettings": ("datastore.ingestion.quality.similar", "DedupSettings"),
    "DependencyError": ("datastore.errors", "DependencyError"),
    "Engine": ("datastore.engines.engine", "Engine"),
    "FileRows": ("datastore.loader.rows.files.opening", "FileRows"),
    "FormatError": ("datastore.errors", "FormatError"),
    "IngestSettings": ("datastore.ingestion.settings", "IngestSettings"),
    "Keep": ("datastore.checkpoint.keeping", "Keep"),
    "Loader": ("datastore.loader.loader", "Loader"),
    "LoaderSettings": ("datastore.loader.settings", "LoaderSettings"),
    "LocalEngine": ("datastore.engines.local", "LocalEngine"),
    "Mixture": ("datastore.loader.mixture.request", "Mixture"),
    "MemoryCheckpointer": ("datastore.checkpoint.places.memory", "MemoryCheckpointer"),
    "MissingError": ("datastore.errors", "MissingError"),
    "PerRank": ("datastore.checkpoint.items", "PerRank"),
    "Rank": ("datastore.loader.settings", "Rank"),
    "RayEngine": ("datastore.engines.ray", "RayEngine"),
    "RejectedError": ("datastore.errors", "RejectedError"),
    "ResumeError": ("datastore.errors", "ResumeError"),
    "RowBatch": ("datastore.loader.rows.batch", "RowBatch"),
    "RowLoader": ("datastore.loader.rows.loader", "RowLoader"),
    "Rows": ("datastore.loader.rows.batch", "Rows"),
    "RunSettings": ("datastore.training.settings", "Settings"),
    "Sampling": ("datastore.training.export.inference", "Sampling"),
    "Stage": ("datastore.loader.mixture.request", "Stage"),
    "StorageError": ("datastore.errors", "StorageError"),
    "Stratified": ("datastore.loader.rows.sampling", "Stratified"),
    "TokenizerSettings": ("datastore.ingestion.encoding.tokenizer", "TokenizerSettings"),
    "TwoPlaces": ("datastore.checkpoint.places.two", "TwoPlaces"),
    "WaitError": ("datastore.errors", "WaitError"),
    "Weighted": ("datastore.loader.rows.sampling", "Weighted"),
    "clone": ("datastore.dataset.operations.clone", "clone"),
    "compact": ("datastore.dataset.operations.compact", "compact"),
    "copy": ("datastore.dataset.operations.copy", "copy"),
    "dedup": ("datastore.ingestion.quality.similar", "deduplicate"),
    "delete": ("datastore.dataset.operations.delete", "delete"),
    "card": ("datastore.dataset.card", "card"),
    "diff": ("datastore.dataset.diff", "diff"),
    "dry_run": ("datastore.training.start", "dry_run"),
    "evaluate": ("datastore.training.export.inference", "evaluate"),
    "evolve": ("datastore.dataset.operations.evolve", "evolve"),
    "expire": ("datastore.dataset.operations.expire", "expire"),
    "export_dataset": ("datastore.interop.export", "export"),
    "export_model": ("datastore.training.export.export", "export"),
    "health": ("datastore.dataset.durability.health", "health"),
    "compress": ("datastore.training.start", "compress"),
    "fork": ("datastore.training.start", "fork"),
    "generate": ("datastore.training.export.inference", "generate"),
    "import_dataset": ("datastore.ingestion.importing", "import_dataset"),
    "ingest": ("datastore.ingestion.ingest", "ingest"),
    "load_settings": ("datastore.config", "load_settings"),
    "open": ("datastore.dataset.snapshot", "open_dataset"),
    "open_files": ("datastore.loader.rows.files.opening", "open_files"),
    "open_storage": ("datastore.storage.resolve", "open_storage"),
    "place": ("datastore.dataset.roots", "place_dataset"),
    "plot": ("datastore.training.run.history", "plot"),
    "protect": ("datastore.dataset.durability.parity", "protect"),
    "prove": ("datastore.training.run.proof", "prove"),
    "purge": ("datastore.dataset.operations.purge.purge", "purge"),
    "repair": ("datastore.dataset.durability.repair", "repair"),
    "resume": ("datastore.training.start", "resume"),
    "set_tag": ("datastore.dataset.log.tags", "set_tag"),
    "teach": ("datastore.training.export.teaching", "teach"),
    "token_writer": ("datastore.ingestion.writers.tokens", "token_writer"),
    "trace": ("datastore.training.run.audit", "trace"),
    "train": ("datastore.training.start", "train"),
    "train_tokenizer": ("datastore.ingestion.encoding.tokenizer", "train_tokenizer"),
    "undelete": ("datastore.dataset.operations.undelete", "undelete"),
    "vacuum": ("datastore.dataset.operations.vacuum", "vacuum"),
    "verify": ("datastore.dataset.durability.verify", "verify"),
    "record_writer": ("datastore.ingestion.writers.records", "record_writer"),
    "replicate": ("datastore.checkpoint.replica", "replicate"),
    "retokenize": ("datastore.ingestion.importing", "retokenize"),
    "rejected_records": ("datastore.ingestion.report", "rejected_records"),
}
"""Where each public name is defined, and what it is called there."""

__all__ = [
    "Batch",
    "Checkpointer",
    "CheckpointerSettings",
    "ConfigError",
    "ConflictError",
    "CorruptError",
    "Dataset",
    "DatastoreError",
    "DcpReader",
    "DcpWriter",
    "DedupSettings",
    "DependencyError",
    "Engine",
    "FileRows",
    "FormatError",
    "IngestSettings",
    "Keep",
    "Loader",
    "LoaderSettings",
    "LocalEngine",
    "MemoryCheckpointer",
    "MissingError",
    "Mixture",
    "PerRank",
    "Rank",
    "RayEngine",
    "RejectedError",
    "ResumeError",
    "RowBatch",
    "RowLoader",
    "Rows",
    "RunSettings",
    "Sampling",
    "Stage",
    "StorageError",
    "Stratified",
    "TokenizerSettings",
    "TwoPlaces",
    "WaitError",
    "Weighted",
    "card",
    "clone",
    "compact",
    "compress",
    "copy",
    "dedup",
    "delete",
    "diff",
    "dry_run",
    "evaluate",
    "evolve",
    "expire",
    "export_dataset",
    "export_model",
    "fork",
    "generate",
    "health",
    "import_dataset",
    "ingest",
    "load_settings",
    "open",
    "open_files",
    "open_storage",
    "place",
    "plot",
    "protect",
    "prove",
    "purge",
    "record_writer",
    "rejected_records",
    "repair",
    "replicate",
    "resume",
    "retokenize",
    "set_tag",
    "teach",
    "token_writer",
    "trace",
    "train",
    "train_tokenizer",
    "undelete",
    "vacuum",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Return a public name, imported now (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("llm-datastore")
    if name not in _HOMES:
        raise AttributeError(f"module 'datastore' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

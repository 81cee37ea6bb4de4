"""Write docs/api, the reference of the Python API: every public name, grouped by what one does with it.

`python tools/api.py` writes the pages; with `--check` it exits with 1 if one is not what would be written. Each page is a
table of names, first sentences and sources, for GitHub; the site puts the docstrings below it (`tools/site/hooks.py`).
"""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "api"


@dataclass(frozen=True, slots=True)
class Topic:
    """One page: what is to be said first, and the names in the order in which one meets them."""

    title: str
    intro: str
    names: tuple[str, ...]


def topic(title: str, intro: str, names: str) -> Topic:
    """Return a topic from text with line breaks."""
    return Topic(title, " ".join(intro.split()), tuple(names.split()))


TOPICS: dict[str, Topic] = {
    "ingest": topic(
        "Text in",
        """
        From files, or what another format holds, to a dataset. How it goes: [bring text
        in](../howto/ingest.md), [come from another format](../howto/migrate.md), [filter
        texts](../howto/quality.md).
        """,
        """
        ingest import_dataset retokenize token_writer record_writer train_tokenizer dedup rejected_records
        IngestSettings TokenizerSettings DedupSettings Engine LocalEngine RayEngine
        """,
    ),
    "datasets": topic(
        "Datasets",
        """
        Open one, look at it, change it, keep it safe. How it goes: [versions](../howto/versions.md),
        [deletions](../howto/deletion.md), [a lost disk](../howto/redundancy.md).
        """,
        """
        open Dataset diff card set_tag delete undelete purge compact evolve expire vacuum copy clone
        export_dataset verify health protect repair place open_storage
        """,
    ),
    "loading": topic(
        "Batches out",
        """
        Samples of tokens by `ds.Loader`, rows of any schema by `ds.RowLoader`. [The order](../order.md)
        says which comes when; [the loader in your own loop](../howto/own-loop.md),
        [rows](../howto/rows.md), [mixtures](../howto/mixtures.md). In shapes B is the rows of a batch on
        this rank, and T is `seq_len + 1`.
        """,
        """
        Loader LoaderSettings Rank Batch Mixture Stage RowLoader RowBatch Rows Weighted Stratified
        open_files FileRows
        """,
    ),
    "checkpoints": topic(
        "Checkpoints",
        """
        Save and restore the state of a training program. What is promised:
        [checkpoints](../checkpoints.md).
        """,
        """
        Checkpointer CheckpointerSettings PerRank TwoPlaces MemoryCheckpointer Keep replicate DcpWriter DcpReader
        """,
    ),
    "training": topic(
        "Training",
        """
        Runs by settings, and what one does with a run. The settings one by one: [settings](../settings.md);
        how it works: [the trainer](../trainer.md).
        """,
        """
        RunSettings load_settings train resume fork dry_run compress prove trace plot evaluate generate Sampling
        export_model teach
        """,
    ),
    "errors": topic(
        "Errors",
        """
        Told apart by what the caller does next. [Handle errors](../howto/errors.md) shows how to;
        [troubleshooting](../troubleshooting.md) says of each code how it comes about.
        """,
        """
        DatastoreError ConfigError MissingError ConflictError CorruptError FormatError ResumeError
        RejectedError DependencyError WaitError StorageError
        """,
    ),
}
"""Each page by the name of its file."""

EXTENDING: dict[str, tuple[str, ...]] = {
    "datastore.torch": (
        "stream",
        "rank_of",
        "TensorStream",
        "TensorBatch",
        "TokenDataset",
        "SampleDataset",
        "document_layout",
        "DocumentLayout",
    ),
    "datastore.media": ("decode_image", "decode_sound", "Sound"),
    "datastore.loader.trace": ("locate", "plan_step", "SampleOrigin", "DocumentSpan"),
    "datastore.loader.forecast.forecast": ("forecast", "Cluster", "Forecast"),
    "datastore.checkpoint.inspect": ("list_steps", "inspect_step", "verify_step"),
    "datastore.ingestion.quality.filter": ("Filter",),
    "datastore.training.hooks.base": ("Hook", "RunState"),
    "datastore.training.objectives.base": ("Objective", "Context", "MicroBatch", "Share"),
    "datastore.training.session.trackers": ("Tracker", "TrackedRun"),
    "datastore.storage.base": ("Storage", "ReadOnly", "Stat"),
    "datastore.testing.storage": ("StorageContract",),
    "datastore.testing.resume": ("check_resumes_everywhere", "Resumable"),
}
"""What programs import from modules of their own, by module."""

HEAD_OF_EXTENDING = """\
# To build upon

Names that programs import from their own modules: tensors and media for training loops, classes to inherit from, and the
checks that they must pass. Which of these promise what is said in [stability](../stability.md).
"""

HEAD_OF_INDEX = """\
# The Python API

`import datastore as ds` has every name of these pages, and loads each when it is first used. What is not here, and does
not stand in [to build upon](extending.md), may change without notice; see [stability](../stability.md). `python tools/api.py`
writes these pages from the docstrings.
"""


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    made = {f"{name}.md": page(about) for name, about in TOPICS.items()}
    return made | {"extending.md": extending(), "index.md": index()}


def page(about: Topic) -> str:
    """Return one page: a table of names, and room for their docstrings."""
    datastore = importlib.import_module("datastore")
    rows = [row(f"ds.{name}", getattr(datastore, name)) for name in about.names]
    places = [f"<!-- api: datastore.{name} -->\n" for name in about.names]
    return "\n".join([f"# {about.title}", "", about.intro, "", "| name | |", "|---|---|", *rows, "", *places])


def extending() -> str:
    """Return the page of the names in `EXTENDING`."""
    lines = [HEAD_OF_EXTENDING]
    for name, public in EXTENDING.items():
        module = importlib.import_module(name)
        lines += [f"## `{name}`", "", first_sentence(module), "", "| name | |", "|---|---|"]
        lines += [row(shown, getattr(module, shown)) for shown in public]
        lines += ["", *(f"<!-- api: {name}.{shown} -->\n" for shown in public)]
    return "\n".join(lines)


def index() -> str:
    """Return the page that leads to the others."""
    lines = [HEAD_OF_INDEX]
    for name, about in TOPICS.items():
        lines.append(f"- [{about.title}]({name}.md): {', '.join(f'`{public}`' for public in about.names)}")
    lines += [f"- [To build upon](extending.md): {', '.join(f'`{name}`' for name in EXTENDING)}", ""]
    return "\n".join(lines)


def row(shown: str, value: Any) -> str:
    """Return the row of a table for the name that is `shown`: where it is defined, and its first sentence."""
    source = Path(inspect.getsourcefile(inspect.unwrap(value)) or "").resolve().relative_to(ROOT).as_posix()
    return f"| [`{shown}`](../../{source}) | {first_sentence(value).replace('|', chr(92) + '|')} |"


def first_sentence(value: Any) -> str:
    """Return the first sentence of the docstring of `value`, on one line."""
    paragraph = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", paragraph)[0]


def main() -> int:
    """Write the pages, or with `--check` compare."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    if "--check" not in sys.argv:
        for name, text in made.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    wrong = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if wrong:
        sys.stderr.write(f"not what the docstrings say: {', '.join(wrong)} in docs/api; run python tools/api.py\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

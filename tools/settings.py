"""Write docs/settings.md, the page of all settings with their defaults, from the records that declare them.

`python tools/settings.py` writes it; with `--check` it exits with 1 if the page is not what would be written. What a setting
means is the text below it in the code.
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.config import default_of as default_value
from datastore.config import meanings_of, toml_value
from datastore.document import SettingsDocument
from datastore.ingestion.encoding.tokenizer import TokenizerSettings
from datastore.ingestion.quality.chain import AnyFilter
from datastore.ingestion.quality.similar import DedupSettings
from datastore.ingestion.settings import IngestSettings
from datastore.loader.settings import LoaderSettings
from datastore.training.export.inference import Sampling
from datastore.training.hooks.adapt import AdaptSettings
from datastore.training.hooks.distill import DistillSettings
from datastore.training.hooks.ema import EmaSettings
from datastore.training.hooks.prune import PruneSettings
from datastore.training.hooks.quantizing.settings import QuantizeSettings
from datastore.training.hooks.share import ShareSettings
from datastore.training.hooks.shrink import ShrinkSettings
from datastore.training.objectives.captions import CaptionsSettings
from datastore.training.objectives.language import CausalSettings, MaskedSettings
from datastore.training.objectives.preference import PreferenceSettings
from datastore.training.objectives.records import ClassesSettings, ClicksSettings, NextItemSettings
from datastore.training.session.trackers import WeightsAndBiasesSettings
from datastore.training.settings import Settings
from datastore.units import format_bytes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """\
# Settings

Every setting, what it is if nothing is said, and what it may be. `python tools/settings.py` writes this page from the records
that declare them, so it cannot be out of date.

On the command line a setting is given as `--set KEY=VALUE`, where VALUE is TOML, or else plain text; what is needed often has
an option of its own as well. In Python the records below are arguments, such as `ds.IngestSettings(workers=4)`. A key that
is not here is refused with the one that is most like it, and a value out of range with the range.
"""

SECTIONS = (
    (
        "A training run",
        (
            "What the TOML file of `datastore train` holds, one table for each part; `--set train.steps=200` changes one value. "
            "[The trainer](trainer.md#settings) shows a file. In Python: `ds.RunSettings`, and `ds.load_settings` reads a file."
        ),
        (("", Settings),),
    ),
    (
        "Objectives",
        (
            "The `[objective]` table names what is learned with `use`, and owns its other keys; there is "
            "[a recipe for each](howto/recipes.md)."
        ),
        (
            ("causal, chat: ", CausalSettings),
            ("masked: ", MaskedSettings),
            ("preference: ", PreferenceSettings),
            ("classes: ", ClassesSettings),
            ("next_item: ", NextItemSettings),
            ("clicks: ", ClicksSettings),
            ("captions: ", CaptionsSettings),
        ),
    ),
    (
        "Hooks",
        ("A `[[hooks]]` table names a [hook](trainer.md#hooks) with `use`, and owns its other keys. Those of ours:"),
        (
            ("prune: ", PruneSettings),
            ("shrink: ", ShrinkSettings),
            ("share: ", ShareSettings),
            ("distill: ", DistillSettings),
            ("ema: ", EmaSettings),
            ("quantize: ", QuantizeSettings),
            ("adapt: ", AdaptSettings),
        ),
    ),
    (
        "Trackers",
        "A `[[metrics.trackers]]` table names a [tracker](trainer.md#trackers) with `use`, and owns its other keys.",
        (("wandb: ", WeightsAndBiasesSettings),),
    ),
    (
        "Bring text in",
        "Of `datastore ingest` and `datastore import`, in Python `ds.IngestSettings`. See [bring text in](howto/ingest.md).",
        (("", IngestSettings),),
    ),
    (
        "Filters",
        (
            "A `[[filters]]` table of an ingest names a filter with `use`, and owns its other keys. See "
            "[filter texts](howto/quality.md)."
        ),
        tuple((f"{kind.__struct_config__.tag}: ", kind) for kind in get_args(AnyFilter)),
    ),
    (
        "Near duplicates",
        "Of `datastore dedup`, in Python `ds.DedupSettings`. See [filter texts](howto/quality.md#near-duplicates).",
        (("", DedupSettings),),
    ),
    ("A tokenizer", "Of `ds.train_tokenizer`, in Python `ds.TokenizerSettings`.", (("", TokenizerSettings),)),
    (
        "A loader",
        "The argument `options` of `ds.Loader`, in Python `ds.LoaderSettings`; and the table `[loader]` of a run.",
        (("", LoaderSettings),),
    ),
    (
        "Checkpoints",
        "`CheckpointerSettings` (`datastore.checkpoint.steps`) is the argument `options` of `ds.Checkpointer`; `ds.Keep` its argument `keep`.",
        (("", CheckpointerSettings), ("Keep: ", Keep)),
    ),
    ("Generated text", "Of `datastore generate`.", (("", Sampling),)),
)


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, text, records in SECTIONS:
        rows = [
            f"| `{key}` | {default} | {allowed} | {meaning} |"
            for above, kind in records
            for key, default, allowed, meaning in rows_of(kind, above)
        ]
        table = "\n".join(["| setting | default | may be | |", "|---|---|---|---|", *rows])
        parts.append(f"## {title}\n\n{textwrap.fill(text, 126, break_on_hyphens=False)}\n\n{table}\n")
    return "\n".join(parts)


def rows_of(kind: type[msgspec.Struct], above: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, default, range and meaning of each setting of `kind`, those of its tables included."""
    hints = get_type_hints(kind, include_extras=True)
    meanings = meanings_of(kind)
    for field in msgspec.structs.fields(kind):
        key = f"{above}{field.name}"
        if isinstance(field.type, type) and issubclass(field.type, SettingsDocument):
            yield from rows_of(field.type, f"{key}.")
            continue
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        yield key, default_of(field).replace("|", "\\|"), allowed(hints[field.name]), meaning
        for inner in get_args(field.type):
            if isinstance(inner, type) and issubclass(inner, SettingsDocument):
                yield from rows_of(inner, f"{key}.NAME." if get_origin(field.type) is dict else f"{key}.")


def default_of(field: Any) -> str:
    """Return the default as TOML writes it."""
    if field.required:
        return "must be given"
    value = default_value(field)
    if value is None:
        return "none"
    size = f" ({format_bytes(value)})" if field.name.endswith("_bytes") and value >= 1024 else ""
    return f"`{toml_value(value)}`{size}"


NAMES = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", dict: "table"}
LARGEST = 2**63 - 1
"""A limit that nobody comes near: of what is stored, not of what makes sense."""

LIMITS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}", "min_length": ""}


def allowed(kind: Any) -> str:
    """Return which values `kind` allows, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        meta = inner[1]
        limits = [
            text.format(f"{getattr(meta, name):,}")
            for name, text in LIMITS.items()
            if text and getattr(meta, name) not in {None, LARGEST}
        ]
        return " ".join([allowed(inner[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{toml_value(value)}`" for value in inner)
    if origin in {Union, UnionType}:
        return ", ".join(dict.fromkeys(allowed(part) for part in inner if part is not type(None)))
    if origin is tuple:
        return f"list: {allowed(inner[0])}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return NAMES[dict]
    return NAMES[origin or kind]


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/settings.md is not what the code says: run python tools/settings.py")

"""The texts of evaluations as token ids, so that documents can be held against them.

They are read as sources are, and encoded by the tokenizer of the ingest: once as they begin a document, and once as they follow a
space, since a tokenizer may give other ids for the two.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from datastore.errors import ConfigError
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.plan import make_plan, work_items
from datastore.ingestion.quality.contamination import Contamination, Decontaminate
from datastore.ingestion.reading.documents import TextRecord, read_part
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.settings import IngestSettings
from datastore.storage.resolve import open_storage

__all__ = ["read_contamination"]

_BATCH = 256


def read_contamination(settings: IngestSettings, tokenizer: bytes | None) -> Contamination | None:
    """Return the runs of tokens that documents must not have; None if nothing is asked.

    Raises:
        ConfigError: there is no tokenizer, what is taken is no text, or a file has no text that is long enough.
        MissingError, CorruptError, StorageError: a file cannot be read.
    """
    wanted = settings.decontaminate
    if not wanted.files:
        return None
    if tokenizer is None or settings.take != "text":
        raise ConfigError(
            "evaluations are kept out of tokens of texts",
            take=settings.take,
            hint="Name a tokenizer, `tokenizer=FILE`, or leave out `decontaminate`.",
        )
    encoder = TextEncoder(tokenizer, settings)
    return Contamination.of(_encoded(wanted, encoder), length=wanted.tokens)


def _encoded(wanted: Decontaminate, encoder: TextEncoder) -> Iterator[tuple[str, Any]]:
    """Yield the name of the file and the ids of each text."""
    texts = _texts(wanted)
    while batch := list(islice(texts, _BATCH)):
        for space in ("", " "):
            encoded = encoder.encode([space + text for _, text in batch])
            names = [name for place, (name, _) in enumerate(batch) if place not in encoded.faults]
            ends = np.cumsum(encoded.counts)
            for name, start, stop in zip(names, ends - encoded.counts, ends, strict=True):
                yield name, encoded.values[start : stop - 1]


def _texts(wanted: Decontaminate) -> Iterator[tuple[str, str]]:
    """Yield the name of the file and each text in it.

    Raises:
        ConfigError: a text cannot be read: what is not looked for would be found in the data.
    """
    reading = msgspec.structs.replace(IngestSettings(), text_key=wanted.text_key, take="text")
    listing, roots = list_sources(wanted.files, reading)
    plan = make_plan(listing, settings=reading, kind="records", reading_digest="")
    for file, start, stop in (part for order in work_items(plan) for part in order.parts):
        url, key = roots.locate(file.path)
        for found in read_part(open_storage(url), key, file=file, span=(start, stop), settings=reading):
            if not isinstance(found, TextRecord):
                raise ConfigError(
                    "a text of an evaluation cannot be read",
                    file=file.path,
                    reason=found if isinstance(found, str) else found.reason,
                    hint="Correct it, or name the key of the text: `decontaminate.text_key=KEY`.",
                )
            yield file.path, found.text

"""The chat template that a tokenizer comes with: beside its `tokenizer.json`, as the hub and `save_pretrained` lay it out.

    FOLDER/tokenizer.json          what a dataset keeps
    FOLDER/tokenizer_config.json   bos_token and the like, often the template, too
    FOLDER/chat_template.jinja     the template of newer ones; it goes before the other

A dataset keeps the tokenizer, not the template: whoever adds chats to it names both again.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datastore.errors import ConfigError, MissingError
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.reading.sources import read_url
from datastore.ingestion.settings import IngestSettings

__all__ = ["chat_format", "tokenizer_file"]

_DEFAULT = "default"


def tokenizer_file(named: str) -> str:
    """Return the URL of the `tokenizer.json` that `named` is, or that lies in the folder it is."""
    is_file = not named or named.endswith(".json") or Path(named).is_file()
    return named if is_file else f"{named.rstrip('/')}/tokenizer.json"


def chat_format(settings: IngestSettings) -> ChatFormat:
    """Return how the chats of an ingest become text.

    Raises:
        ConfigError: there is no template, several and none of them the default, or a file that is damaged.
        MissingError: the named template does not exist.
    """
    config = _config(settings.tokenizer)
    template, name = _template(settings, config)
    variables = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    today = settings.chat_day or datetime.now(tz=UTC).date().isoformat()
    return ChatFormat(
        template=template,
        variables=variables,
        day=today if "strftime_now" in template else "",
        name=name,
    )


def _template(settings: IngestSettings, config: dict[str, Any]) -> tuple[str, str]:
    """Return the template, and where it is from."""
    if settings.chat_template:
        return _text(settings.chat_template, read_url(settings.chat_template)), settings.chat_template
    beside = _beside(settings.tokenizer, "chat_template.jinja")
    raw = _read(beside)
    if raw is not None:
        return _text(beside, raw), beside
    where = _beside(settings.tokenizer, "tokenizer_config.json")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get(_DEFAULT)
        if not isinstance(found, str):
            raise ConfigError(
                "the tokenizer has several chat templates, and none is the default",
                file=where,
                templates=sorted(map(str, named)),
                hint="Put the one to use into a file: `chat_template=FILE`.",
            )
    if not isinstance(found, str):
        raise ConfigError(
            "the tokenizer has no chat template",
            tokenizer=settings.tokenizer or "that of the dataset",
            hint="Name the folder of a tokenizer that has one, or a file: `chat_template=FILE`.",
        )
    return found, where


def _config(tokenizer: str) -> dict[str, Any]:
    where = _beside(tokenizer, "tokenizer_config.json")
    raw = _read(where)
    try:
        found = json.loads(raw) if raw is not None else {}
    except ValueError as error:
        raise ConfigError(f"not a tokenizer_config.json: {error}", file=where, hint="Get it again.") from None
    if not isinstance(found, dict):
        raise ConfigError("not a tokenizer_config.json", file=where, hint="Get it again.")
    return found


def _beside(tokenizer: str, name: str) -> str:
    """Return the URL of the file `name` in the folder of the tokenizer; empty if none is named."""
    folder, slash, _ = tokenizer_file(tokenizer).rpartition("/")
    return f"{folder}{slash}{name}" if tokenizer else ""


def _read(url: str) -> bytes | None:
    try:
        return read_url(url) if url else None
    except MissingError:
        return None


def _text(url: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ConfigError("a chat template is text in UTF-8", file=url, hint="Save it so.") from None

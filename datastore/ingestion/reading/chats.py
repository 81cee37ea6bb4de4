"""Chats in lines of JSON and in tables: conversations, and pairs of a better and a worse answer.

A chat is read in the two shapes that are common, `messages` (role, content) and `conversations` (from, value), and becomes
one text: the JSON of its messages and tools, which the encoder takes apart again, and of which the document has its
digest. In a table, a null field is one that is not there, as columns cannot tell the two apart.

A pair has `chosen` and `rejected`: texts after a `prompt`, answers after one, or two whole chats.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from datastore.dataset.journal import SourceFile
from datastore.errors import ConfigError
from datastore.ingestion.reading.documents import (
    Reason,
    Reject,
    TextRecord,
    check_unchanged,
    line_parser,
    read_part,
    reject,
)
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.rows import is_table, read_rows
from datastore.ingestion.reading.streams import RecordPiece
from datastore.ingestion.settings import IngestSettings
from datastore.storage.base import Storage

__all__ = ["chat_text", "pair_text", "read_chats", "read_documents"]

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""What `conversations` call the roles, where that is another name."""

_BOM = b"\xef\xbb\xbf"


class _BadRecordError(Exception):
    """A record that is no chat."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def read_chats(
    storage: Storage, key: str, *, file: SourceFile, span: tuple[int, int], settings: IngestSettings
) -> Iterator[TextRecord | Reject | SkipReason]:
    """Yield what the records of `file` that begin in `span` are; otherwise as `read_part`.

    Raises:
        ConfigError: the file has no records, only text.
        ConflictError, CorruptError, StorageError: as `read_part`.
    """
    text_of = pair_text if settings.take == "pairs" else chat_text
    if is_table(file):
        for first, table in read_rows(storage, key, file=file, span=span, settings=settings):
            for row, record in enumerate(table.to_pylist()):
                bare, name = _bare(record), record.get(settings.id_key)
                size = len(orjson.dumps(bare, default=str))
                where = first + row
                if size > settings.max_document_bytes:
                    yield reject(file.path, where, "too_long", str(bare)[:200])
                else:
                    yield _record(bare, name, source=file.path, offset=where, length=size, text_of=text_of)
        check_unchanged(storage, key, file=file)
        return
    if file.format not in {"jsonl", "json"}:
        raise ConfigError(
            "a file of text has no chats",
            file=file.path,
            hint="Name .jsonl files, or say their `format`; leave others out: `include=*.jsonl`.",
        )
    parser = _line_parser(file.path, id_key=settings.id_key, text_of=text_of)
    yield from read_part(storage, key, file=file, span=span, settings=settings, parser=parser)


def read_documents(
    storage: Storage, key: str, *, file: SourceFile, span: tuple[int, int], settings: IngestSettings
) -> Iterator[TextRecord | Reject | SkipReason]:
    """Yield what the records of `file` that begin in `span` are: texts or chats, whichever `settings` take.

    Raises:
        ConfigError, ConflictError, CorruptError, StorageError: as `read_chats` and `read_part`.
    """
    read = read_chats if settings.take in {"chats", "pairs"} else read_part
    return read(storage, key, file=file, span=span, settings=settings)


def chat_text(row: dict[str, Any]) -> str:
    """Return the text of the chat in `row`.

    Raises:
        _BadRecordError: there is none.
    """
    messages = row["messages"] if "messages" in row else _from_shares(row.get("conversations"), row.get("system"))
    return json.dumps({"messages": _checked(messages), **_tools(row)}, ensure_ascii=False)


def pair_text(row: dict[str, Any]) -> str:
    """Return the text of the pair in `row`: two whole chats.

    Raises:
        _BadRecordError: there is none.
    """
    both = {name: _checked(_whole(row.get("prompt"), row.get(name))) for name in ("chosen", "rejected")}
    return json.dumps({**both, **_tools(row)}, ensure_ascii=False)


def _whole(prompt: Any, answer: Any) -> Any:
    """Return the chat of `prompt` and `answer`. An answer that begins with a user has the prompt in it, and must agree."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt or []
    if isinstance(answer, str):
        return [*before, {"role": "assistant", "content": answer}] if isinstance(before, list) else None
    if not isinstance(answer, list) or not answer or not isinstance(before, list):
        return None
    first = answer[0]
    if isinstance(first, dict) and first.get("role") in {"assistant", "tool"}:
        return [*before, *answer]
    if not all(message in answer for message in before):
        raise _BadRecordError("pair_disagrees")
    return answer


def _from_shares(given: Any, system: Any) -> Any:
    """Return the messages of `conversations`, in the shape that ShareGPT has made common."""
    if not isinstance(given, list):
        return given
    found: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for turn in given:
        if not isinstance(turn, dict) or not isinstance(turn.get("from", turn.get("role")), str):
            raise _BadRecordError("bad_message")
        if "from" in turn:
            found.append({"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")})
        else:
            found.append(turn)
    return found


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _BadRecordError("no_messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise _BadRecordError("bad_message")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise _BadRecordError("content_not_text")
        if content is None and not any(value for name, value in message.items() if name != "role"):
            raise _BadRecordError("bad_message")
        if content is not None and "\0" in content:
            raise _BadRecordError("nul")
    return messages


def _tools(row: dict[str, Any]) -> dict[str, Any]:
    """Return the tools of a chat, which many datasets keep as a text of JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError:
            raise _BadRecordError("bad_tools") from None
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _BadRecordError("bad_tools")
    return {"tools": tools}


def _bare(value: Any) -> Any:
    """Return `value` without the fields that are null."""
    if isinstance(value, dict):
        return {name: _bare(each) for name, each in value.items() if each is not None}
    return [_bare(each) for each in value] if isinstance(value, list) else value


def _record(
    row: Any, name: Any, *, source: str, offset: int, length: int, text_of: Callable[[dict[str, Any]], str]
) -> TextRecord | Reject:
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text = text_of(row)
        text.encode()
    except _BadRecordError as error:
        return reject(source, offset, error.reason, shown)
    except UnicodeEncodeError:
        return reject(source, offset, "lone_surrogate", shown)
    except (TypeError, RecursionError):
        return reject(source, offset, "bad_message", shown)
    if name is None:
        return TextRecord(f"{source}#{offset}", source, offset, length, text, named=False)
    if type(name) not in {str, int} or name == "":
        return reject(source, offset, "id_not_text", shown)
    return TextRecord(str(name), source, offset, length, text, named=True)


def _line_parser(
    source: str, *, id_key: str, text_of: Callable[[dict[str, Any]], str]
) -> Callable[[RecordPiece], TextRecord | Reject | None]:
    """Return the parser for lines of JSON; what is no object it gives to that for texts, which says why."""
    strict = line_parser(source, text_key="messages", id_key=id_key)

    def parse(piece: RecordPiece) -> TextRecord | Reject | None:
        data = piece.data[3:] if piece.offset == 0 and piece.data.startswith(_BOM) else piece.data
        try:
            row = orjson.loads(data) if piece.length <= len(piece.data) else None
        except orjson.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            return strict(piece)
        # orjson makes floats of numbers past 64 bits, and a template would write them so.
        row = json.loads(data)
        return _record(row, row.get(id_key), source=source, offset=piece.offset, length=piece.length, text_of=text_of)

    return parse

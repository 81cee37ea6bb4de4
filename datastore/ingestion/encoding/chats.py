"""From chats to token ids and a loss mask: the ids that `apply_chat_template` of `transformers` gives, no end of text added.

A template writes all of it, the beginning of a text and the end of a turn too, so nothing else adds any. Of the answers,
their tokens and what ends them are to be learned. Where they are, `{% generation %}` says, or else the difference between
two texts: of the chat up to an answer, and with it. That is right only if each of these is the beginning of the next, which is
checked for every answer; a template that rewrites earlier turns is not guessed at.

A special token that a message spells is made of ordinary tokens. The text is cut at the tokens that are real, and what lies
between is encoded as text; it is checked that the cuts themselves change no id.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.ingestion.encoding.encoder import Counts
from datastore.ingestion.encoding.reference import load_tokenizer, special_tokens
from datastore.ingestion.encoding.template import ChatFormat, ChatTemplate, Messages, Rendered, TemplateRefusedError
from datastore.ingestion.reading.documents import Reason
from datastore.ingestion.settings import IngestSettings, SpecialTokens

__all__ = ["ChatEncoder", "ChatTokens", "UnusableChatError", "end_to_end", "require_usable"]

Spans = Sequence[tuple[int, int]]
Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

_BEGIN, _END = itemgetter(0), itemgetter(1)


class UnusableChatError(Exception):
    """A chat that gives no document, and why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """A chat as tokens."""

    ids: Ids
    mask: Mask
    """Which of them are to be learned."""

    escaped: bool
    """Whether a message spells a special token."""


class ChatEncoder:
    """A tokenizer with its chat template, for one thread at a time."""

    name = "tokenizers"

    def __init__(self, raw: bytes, form: ChatFormat, special: SpecialTokens) -> None:
        self._live = load_tokenizer(raw)
        self._plain = load_tokenizer(raw)
        self._plain.encode_special_tokens = True
        self._special = special_tokens(self._live)
        self._template = ChatTemplate(form, [] if special == "allow" else list(self._special.values()))
        _require_tokens(form, self._special.values())
        self._refuses_special = special == "reject"
        self.vocab_size = max(self._live.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> ChatTokens:
        """Return the chat in `text`, which is as `reading/chats.py` writes it.

        Raises:
            UnusableChatError: it gives no document.
        """
        chat = json.loads(text)
        return self._encoded(chat["messages"], chat.get("tools"), learn_from=0)

    def encode_pair(self, text: str) -> tuple[ChatTokens, ChatTokens]:
        """Return the two chats of a preference, chosen and rejected; what they share is not to be learned.

        Raises:
            UnusableChatError: one of them gives no document.
        """
        pair = json.loads(text)
        both = [pair["chosen"], pair["rejected"]]
        shared = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
        chosen, rejected = (self._encoded(each, pair.get("tools"), learn_from=shared) for each in both)
        return chosen, rejected

    def _encoded(self, messages: Messages, tools: Any, *, learn_from: int) -> ChatTokens:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(i >= learn_from for i in answers):
            raise UnusableChatError("no_answer", "the assistant says nothing")
        try:
            whole = self._template.render(messages, tools=tools)
            _require_all(messages, tools, whole.text)
            spans = list(self._spans(whole, messages, tools, answers))
        except TemplateRefusedError as error:
            raise UnusableChatError("template_refused", str(error)) from None
        learned = [span for i, span in zip(answers, spans, strict=True) if i >= learn_from]
        if whole.escaped and self._refuses_special:
            raise UnusableChatError("special_token", "a message spells a special token")
        ids, offsets = self._tokens(whole)
        if ids.size == 0:
            raise UnusableChatError("no_tokens", "the text of the template is empty")
        if int(ids.max()) >= self.vocab_size:
            raise UnusableChatError("token_out_of_range", "an id is past the vocabulary")
        mask = np.zeros(ids.size, dtype=np.bool_)
        for start, stop in learned:
            mask[bisect_right(offsets, start, key=_END) : bisect_left(offsets, stop, key=_BEGIN)] = True
        if not mask.any():
            raise UnusableChatError("no_answer", "the answers have no tokens")
        return ChatTokens(ids, mask, escaped=bool(whole.escaped))

    def _spans(
        self, whole: Rendered, messages: Messages, tools: Any, answers: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield from where to where each answer goes in the text of all messages."""
        if self._template.marks_answers:
            if len(whole.answers) != len(answers):
                raise UnusableChatError(
                    "mask_unknown", f"the template marks {len(whole.answers)} answers, the chat has {len(answers)}"
                )
            yield from whole.answers
            return
        for i in answers:
            before = self._template.render(messages[:i], tools=tools, prompt=True).text
            after = self._template.render(messages[: i + 1], tools=tools).text
            if not (whole.text.startswith(after) and after.startswith(before)):
                raise UnusableChatError(
                    "mask_unknown",
                    f"{self._template.name}: the text of the chat up to message {i} is not how the whole one begins",
                )
            yield len(before), self._end(after, len(before))

    def _end(self, text: str, start: int) -> int:
        """Return where the answer at the end of `text` ends: at the token that ends a turn, not at a blank after it."""
        bare = text.rstrip()
        return len(bare) if len(bare) > start and bare.endswith(tuple(self._special.values())) else len(text)

    def _tokens(self, whole: Rendered) -> tuple[Ids, Spans]:
        """Return the ids of a text, and where the text of each begins and ends."""
        found = self._live.encode(whole.text, add_special_tokens=False)
        if not whole.escaped:
            return np.array(found.ids, dtype=np.uint32), found.offsets
        real = [
            span
            for i, span in zip(found.ids, found.offsets, strict=True)
            if i in self._special and not any(begin < span[1] and span[0] < end for begin, end in whole.escaped)
        ]
        ids: list[int] = []
        again: list[int] = []
        offsets: list[tuple[int, int]] = []
        for begin, end, is_token in _cut(len(whole.text), real):
            piece = whole.text[begin:end]
            live = self._live.encode(piece, add_special_tokens=False)
            taken = live if is_token else self._plain.encode(piece, add_special_tokens=False)
            again += live.ids
            ids += taken.ids
            offsets += [(begin + a, begin + b) for a, b in taken.offsets]
            if not is_token and not self._special.keys().isdisjoint(taken.ids):
                raise UnusableChatError("special_token", "the tokenizer makes a special token of plain text")
        if again != found.ids:
            raise UnusableChatError(
                "special_token", "a message spells a special token, and the tokenizer cannot escape it"
            )
        return np.array(ids, dtype=np.uint32), offsets


def _cut(length: int, real: Spans) -> Iterator[tuple[int, int, bool]]:
    """Yield the pieces of a text, which are tokens or lie between two."""
    at = 0
    for begin, end in real:
        if at < begin:
            yield at, begin, False
        yield begin, end, True
        at = end
    if at < length:
        yield at, length, False


def _require_tokens(form: ChatFormat, special: Collection[str]) -> None:
    """Raise if the template writes a token that the tokenizer's config names, and its own file does not.

    `transformers` would make a new token of it, with an id that the dataset's tokenizer does not have.
    """
    lacking = {
        name: value
        for name, value in form.variables.items()
        if value
        and value not in special
        and (re.search(rf"\b{re.escape(name)}\b", form.template) or value in form.template)
    }
    if lacking:
        raise ConfigError(
            "the chat template writes tokens that the tokenizer.json does not have as special ones",
            template=form.name,
            lacking=lacking,
            hint="Save the tokenizer again with transformers, which adds them: `save_pretrained(FOLDER)`.",
        )


def _require_all(messages: Messages, tools: Any, text: str) -> None:
    """Raise unless `text` holds what each message says: a template may leave out, without a word, what it does not know.

    An answer may lose what it thought, up to `</think>`. Of calls and tools, their names are looked for.
    """
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "assistant":
            content = content.rpartition("</think>")[2]
        names = _names(message.get("tool_calls"))
        if not all(_is_in(each, text) for each in (content.strip(), *names)):
            raise UnusableChatError("message_dropped", f"message {i} ({message['role'][:20]}) is not in the text")
    lacking = [name for name in _names(tools) if not _is_in(name, text)]
    if lacking:
        raise UnusableChatError("message_dropped", f"the tool {lacking[0][:40]} is not in the text")


def _names(given: Any) -> list[str]:
    """Return the names of functions, in either of the shapes that calls and tools have."""
    entries = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    inner = [each["function"] if isinstance(each.get("function"), dict) else each for each in entries]
    return [each["name"] for each in inner if isinstance(each.get("name"), str)]


def _is_in(content: str, text: str) -> bool:
    """Return whether `text` holds `content`, as it is or within a string of JSON."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def end_to_end(chats: Sequence[ChatTokens]) -> tuple[Ids, Mask, Counts]:
    """Return the ids and masks of `chats`, one after the other, and how many tokens each has."""
    counts = np.array([chat.ids.size for chat in chats], dtype=np.int64)
    if not chats:
        return np.empty(0, np.uint32), np.empty(0, np.bool_), counts
    return np.concatenate([chat.ids for chat in chats]), np.concatenate([chat.mask for chat in chats]), counts


_PROBE = (
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "B."},
    {"role": "user", "content": "C?"},
    {"role": "assistant", "content": "D."},
)


def require_usable(raw: bytes, form: ChatFormat, settings: IngestSettings) -> None:
    """Raise unless the answers of an ordinary chat of two turns can be told apart; one that it refuses proves nothing.

    Raises:
        ConfigError: they cannot, or it is no template.
        DependencyError: jinja2 is not installed.
    """
    encoder = ChatEncoder(raw, form, settings.special_tokens)
    try:
        encoder.encode(json.dumps({"messages": _PROBE}))
    except UnusableChatError as error:
        if error.reason == "mask_unknown":
            raise ConfigError(
                f"the chat template does not tell where answers are: {error.detail}",
                template=form.name,
                hint="Put each answer in it between {% generation %} and {% endgeneration %}: `chat_template=FILE`.",
            ) from None

"""The chat template of a tokenizer: from messages to one text, and which stretches of it the assistant has said.

Templates come with models of other people, so they run in jinja2's sandbox, set up as `transformers` does: the same filters,
extensions and variables, messages without their null fields; but not its own `dict` and `namespace`. Three things differ on purpose.
`strftime_now` gives the day (and no hour) that the ingest was told, or the same source would make other shards tomorrow. Strings of a message
that spell a special token are marked, so that what a user has written does not become one; a token that a template puts together from pieces
of several strings is not seen. And an answer within `{% generation %}` is marked
where it stands; its place is right in a macro, too.

Source: transformers 5.24, `utils/chat_template_utils.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from datastore.document import Document
from datastore.errors import ConfigError, DependencyError

__all__ = ["ChatFormat", "ChatTemplate", "Messages", "Rendered", "TemplateRefusedError", "load_environment"]

Messages = Sequence[Mapping[str, Any]]

_ANSWER, _ANSWER_END, _TEXT, _TEXT_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Marks: noncharacters of Unicode, which are for use within one program."""

_MARK = re.compile("[\ufdd0-\ufdd3]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusedError(Exception):
    """The template has no text for these messages. Nobody but the encoder sees it: the chat becomes a reject."""


class ChatFormat(Document, frozen=True, kw_only=True):
    """All that the text of a chat depends on beside its messages."""

    template: str
    variables: dict[str, Any]
    """What the tokenizer tells the template: `bos_token` and the like."""

    day: str = ""
    """What `strftime_now` tells of, as 2026-11-28; empty if the template does not ask."""

    name: str = ""
    """Where the template is from."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text."""

    text: str
    answers: Sequence[tuple[int, int]]
    """From where to where the assistant speaks, if `{% generation %}` says so."""

    escaped: Sequence[tuple[int, int]]
    """Where a string of the messages spells a special token."""


def load_environment() -> Any:
    """Return jinja2's sandbox as `transformers` sets it up, with `{% generation %}`.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import ext, nodes, sandbox  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError("jinja2 is not installed", hint="Run: pip install 'llm-datastore[chat]'.") from None

    class Generation(ext.Extension):
        """The tag `{% generation %}`: its body between two marks."""

        tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{_ANSWER}{caller()}{_ANSWER_END}"

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


class ChatTemplate:
    """A template that is ready. `special` are the texts of the tokens that a message must not bring in.

    Raises:
        ConfigError: it is no template, or needs a variable that the tokenizer does not give.
        DependencyError: jinja2 is not installed.
    """

    def __init__(self, form: ChatFormat, special: Sequence[str]) -> None:
        environment = load_environment()
        from jinja2 import TemplateError, TemplateSyntaxError, meta  # noqa: PLC0415 - optional

        self._errors = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError)
        environment.globals["strftime_now"] = partial(_day_as, form.day)
        try:
            wanted = meta.find_undeclared_variables(environment.parse(form.template))
            self._template = environment.from_string(form.template)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"not a chat template: {error}", template=form.name, hint="Name a file in jinja2's language."
            ) from None
        lacking = sorted(name for name in wanted if name.endswith("_token") and not form.variables)
        if lacking:
            raise ConfigError(
                "the chat template needs what nobody says",
                template=form.name,
                variables=lacking,
                hint="Name a tokenizer that has a tokenizer_config.json beside it.",
            )
        self.name = form.name
        self.marks_answers = bool(_GENERATION.search(form.template))
        self._variables = form.variables
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, messages: Messages, *, tools: Any = None, prompt: bool = False) -> Rendered:
        """Return the text of `messages`; with `prompt`, and the beginning of the next answer.

        Raises:
            TemplateRefusedError: the template has none for them.
        """
        given = [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        try:
            marked = self._template.render(
                messages=self._escape(given),
                tools=self._escape(tools),
                documents=None,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except self._errors as error:
            raise TemplateRefusedError(str(error) or type(error).__name__) from None
        except RecursionError:
            raise TemplateRefusedError("its messages are nested too deeply") from None
        return _unmarked(marked, self._special)

    def _escape(self, value: Any) -> Any:
        """Return `value` with marks around each special token that a string in it spells."""
        if isinstance(value, str):
            if _MARK.search(value):
                raise TemplateRefusedError("a message holds a noncharacter, U+FDD0 to U+FDD3, which marks are made of")
            return self._special.sub(f"{_TEXT}\\g<0>{_TEXT_END}", value)
        if isinstance(value, dict):
            return {self._escape(name): self._escape(each) for name, each in value.items()}
        return [self._escape(each) for each in value] if isinstance(value, list) else value


def _unmarked(marked: str, special: re.Pattern[str]) -> Rendered:
    """Return the text without its marks, and where they were.

    A mark may be alone, as a template may cut a string at a token, or take its first letter. What is left of the token is beside
    the mark: if it is whole, it is still what a message spells.
    """
    parts: list[str] = []
    answers: list[tuple[int, int]] = []
    escaped: list[tuple[int, int]] = []
    ends = {_ANSWER_END: answers, _TEXT_END: escaped}
    begun: dict[str, int] = {}
    at, last = 0, 0
    only_begun: set[int] = set()
    only_ended: set[int] = set()
    for mark in _MARK.finditer(marked):
        parts.append(marked[last : mark.start()])
        at, last = at + mark.start() - last, mark.end()
        if mark[0] in ends:
            begin = begun.pop(chr(ord(mark[0]) - 1), None)
            if begin is not None and begin < at:
                ends[mark[0]].append((begin, at))
            elif begin is None and mark[0] == _TEXT_END:
                only_ended.add(at)
        else:
            if mark[0] == _TEXT and mark[0] in begun:
                only_begun.add(begun[mark[0]])
            begun[mark[0]] = at
    text = "".join([*parts, marked[last:]])
    only_begun |= {begun[_TEXT]} if _TEXT in begun else set()
    if only_begun or only_ended:
        tokens = [found.span() for found in special.finditer(text)]
        escaped += [span for span in tokens if span[0] in only_begun or span[1] in only_ended]
    return Rendered(text, answers, escaped)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return `message` with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - how templates call it
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Return `value` as JSON; jinja2's own filter would escape `<` and `&`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    """Raise what a template has to say."""
    raise TemplateRefusedError(message)


def _day_as(day: str, pattern: str) -> str:
    """Return the day as `pattern` has it; without one, today's would change what the shards hold."""
    return date.fromisoformat(day).strftime(pattern)

"""An engine: something that calls a function in other processes, on this machine or on many.

That is all that is asked of it. An order is bytes, the answer is bytes, and the function is one that every process can import; so
an engine need know nothing of datasets, and is a few lines on top of whatever runs functions. What an order makes goes to the
dataset's storage, never through the engine: no memory is shared, and only the storage must be the same for all.

An order may be done twice, or be given up in the middle and done elsewhere: what comes of it is the same, and only the
coordinator commits.
"""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import msgspec

from datastore.document import Document
from datastore.errors import DatastoreError, error_from_dict

__all__ = ["Engine", "Function", "Order", "Piece", "Tell", "perform", "spread", "work"]

Tell = Callable[[bytes], None]
"""Told each step on the way to an answer."""

Function = Callable[[bytes, Tell], bytes]
"""What is done elsewhere, at the top of a module of this package: an order and whom to tell of steps, to an answer."""


class Engine(ABC):
    """Calls a function in other processes, or on other machines."""

    @abstractmethod
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        """Yield `work(order)` for each of `orders`, in any order and from any process; take orders only as they are needed.

        If it is closed early, what has not begun need not be done any more. `work` raises nothing that is of use elsewhere: an
        error of the work is an answer, too.

        Raises:
            DatastoreError: an order was given up, since its process died again and again, say.
        """


@dataclass(frozen=True, slots=True)
class Piece:
    """Some work: all that `function` needs for it, and what to call it if it goes wrong."""

    order: bytes
    about: Mapping[str, str] = field(default_factory=dict)


class Order(Document, frozen=True, kw_only=True):
    """A piece of work as it goes to another process. Never stored: it may hold credentials."""

    call: str
    """`module:function`."""

    number: int
    order: bytes
    about: dict[str, str]
    path: tuple[str, ...] = ()
    """The caller's `sys.path`, if functions of the user are to be found there, too."""


class _Step(Document, frozen=True, kw_only=True, tag=True):
    value: bytes


class _Done(Document, frozen=True, kw_only=True, tag=True):
    number: int
    value: bytes


class _Failed(Document, frozen=True, kw_only=True, tag=True):
    error: dict[str, Any]
    """As `DatastoreError.as_dict` gives it."""


_MESSAGES: msgspec.msgpack.Decoder[list[_Step | _Done | _Failed]] = msgspec.msgpack.Decoder(
    list[_Step | _Done | _Failed]
)
"""An answer is a list of messages; steps may come before it, in lists of their own."""


def spread(
    engine: Engine,
    function: Function,
    pieces: Iterable[Piece],
    *,
    heard: Tell = lambda _: None,
    path: tuple[str, ...] = (),
) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each of `pieces` and what `function` makes of it, as they are done; `heard` is told their steps.

    Raises:
        DatastoreError: what `function` raised; or the engine gave up, or left out a piece.
    """
    waiting: dict[int, Piece] = {}
    call = f"{function.__module__}:{function.__qualname__}"

    def orders() -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            waiting[number] = piece
            order = Order(call=call, number=number, order=piece.order, about=dict(piece.about), path=path)
            yield msgspec.msgpack.encode(order)

    source = orders()
    for message in _messages(engine.map(work, source)):
        match message:
            case _Step(value=step):
                heard(step)
            case _Failed(error=error):
                raise error_from_dict(error)
            case _Done(number=number, value=answer) if waiting.pop(number, None):  # An engine may do a piece twice.
                yield number, answer
    deque(source, maxlen=0)  # What was not even taken is left, too.
    if waiting:
        raise _incomplete(engine, waiting)


def _incomplete(engine: Engine, left: Mapping[int, Piece]) -> DatastoreError:
    return DatastoreError(
        "the engine has not done all of the work",
        engine=type(engine).__name__,
        left=len(left),
        **left[min(left)].about,
        hint="`map` must yield an answer to each order.",
    )


def _messages(answers: Iterator[bytes]) -> Iterator["_Step | _Done | _Failed"]:
    """Yield the messages of all `answers`; close those when it is closed itself."""
    try:
        for raw in answers:
            yield from _MESSAGES.decode(raw)
    finally:
        if isinstance(answers, Generator):
            answers.close()


def work(order: bytes) -> bytes:
    """Do one order, and return its answer, or the error that ended it. It is called in any process, and by any thread."""
    messages: list[_Step | _Done | _Failed] = []
    messages.append(perform(msgspec.msgpack.decode(order, type=Order), messages.append))
    return msgspec.msgpack.encode(messages)


def perform(order: Order, tell: Callable[["_Step"], None]) -> "_Done | _Failed":
    """Do one order, and return its message; `tell` gets that of each step."""
    sys.path += [each for each in order.path if each not in sys.path]
    function: Function = resolve_name(order.call)
    try:
        value = function(order.order, lambda step: tell(_Step(value=step)))
    except DatastoreError as error:
        return _Failed(error=error.as_dict())
    return _Done(number=order.number, value=value)

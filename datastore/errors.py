"""Every error this package raises, grouped by what the caller should do next.

    DatastoreError
    |-- ConfigError      (ValueError)         fix the setting named in the message
    |-- MissingError     (FileNotFoundError)  check the URL or the name
    |-- ConflictError                         someone else wrote first; reload, retry
    |-- CorruptError                          bytes disagree with their digest; refetch or repair
    |-- FormatError                           written by a newer version of this package; upgrade
    |-- ResumeError                           saved state does not fit this run
    |-- RejectedError                         too many records were bad; see the rejects
    |-- DependencyError  (ImportError)        install the named extra
    |-- WaitError        (TimeoutError)       a peer did not answer in time; it is named
    `-- StorageError     (OSError)            the backend failed; `transient` says if a retry can help

A message is a fact, the values it rests on, and the way out:
`fact (name=value, ...). Imperative hint.`
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

__all__ = [
    "ConfigError",
    "ConflictError",
    "CorruptError",
    "DatastoreError",
    "DependencyError",
    "FormatError",
    "MissingError",
    "RejectedError",
    "ResumeError",
    "StorageError",
    "WaitError",
    "error_from_dict",
    "plain",
    "whole_number",
]


class DatastoreError(Exception):
    """The root of the tree; catch it to catch everything this package raises on purpose."""

    code: ClassVar[str] = "error"

    def __init__(self, fact: str, *, hint: str = "", **values: object) -> None:
        """Compose the message from `fact`, `values` (shown as `name=value`) and `hint`."""
        self.fact = fact
        self.hint = hint
        self.values: dict[str, object] = plain(values)
        super().__init__(fact)

    @override
    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        text = f"{self.fact} ({shown})." if shown else f"{self.fact}."
        return f"{text} {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """Return `code`, `fact`, `hint` and `values` as JSON can hold them; what it cannot is text."""
        values = {name: _plain(value) for name, value in self.values.items()}
        return {"code": self.code, "fact": self.fact, "hint": self.hint, "values": values}

    @override
    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (ingest workers); the default would drop hint and values.
        return _rebuild, (type(self), self.fact, self.hint, self.values)


def _rebuild(kind: type[DatastoreError], fact: str, hint: str, values: dict[str, object]) -> DatastoreError:
    return kind(fact, hint=hint, **values)


def error_from_dict(value: Mapping[str, Any]) -> DatastoreError:
    """Return the error that `as_dict` was called on, in another process perhaps, as the class of this module with its code."""
    kinds = {kind.code: kind for kind in DatastoreError.__subclasses__() if kind.__module__ == __name__}
    return _rebuild(kinds.get(value["code"], DatastoreError), value["fact"], value["hint"], value["values"])


def plain(value: Any) -> Any:
    """Return `value` with each number of NumPy, in it or in its lists and dicts, as the Python number that it is.

    It stands on the lowest floor, for errors need it, too; NumPy is not imported for it.
    """
    kind = type(value)
    if kind is dict:
        return {plain(name): plain(inner) for name, inner in value.items()}
    if kind is list or kind is tuple:
        return kind(map(plain, value))
    is_number = kind.__module__ == "numpy" and getattr(value, "shape", None) == () and value.dtype.kind in "biufU"
    return value.item() if is_number else value


def whole_number(value: Any, *, name: str) -> int:
    """Return `value`, a whole number of Python or NumPy, as one of Python.

    Raises:
        ConfigError: it is something else.
    """
    number = plain(value)
    if type(number) is not int:
        raise ConfigError(f"{name} is no whole number", **{name: value}, hint="Give an integer.")
    return number


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float | bool | None) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


class ConfigError(DatastoreError, ValueError):
    """A setting, argument or URL is wrong; the message names it."""

    code = "config"


class MissingError(DatastoreError, FileNotFoundError):
    """Nothing is stored under that URL, key, version, tag or step."""

    code = "missing"


class ConflictError(DatastoreError):
    """Another writer got there first; what it wrote is intact."""

    code = "conflict"


class CorruptError(DatastoreError):
    """Stored bytes do not match the digest that was recorded when they were written."""

    code = "corrupt"


class FormatError(DatastoreError):
    """The stored format is newer than this package, or not one of ours."""

    code = "format"


class ResumeError(DatastoreError):
    """Saved state does not fit what it is loaded into; the message names the keys that differ."""

    code = "resume"


class RejectedError(DatastoreError):
    """More input was rejected than the limit allows, so nothing was committed."""

    code = "rejected"


class DependencyError(DatastoreError, ImportError):
    """An optional package is needed for this; the message names the extra to install."""

    code = "dependency"


class WaitError(DatastoreError, TimeoutError):
    """Another process did not do its part in time; the message names it."""

    code = "timeout"


class StorageError(DatastoreError, OSError):
    """The backend failed: full disk, no permission, network. Nothing half-written is visible."""

    code = "storage"

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed later (throttling, reset connections)."""
        return bool(self.values.get("transient", False))

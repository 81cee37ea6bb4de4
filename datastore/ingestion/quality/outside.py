"""Filters that ask somebody else: a model that knows languages, and a function of the user's own.

What they say depends on more than the settings, so the digest of the model, or of the module that the function is in, is part of
what an ingest is known by: another model or other code makes another ingest. A module that this one imports is not looked
at; change the name of the function if that matters.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import override

from datastore.digest import digest_hex
from datastore.errors import ConfigError, DependencyError, MissingError
from datastore.ingestion.quality.filter import Filter, Share
from datastore.ingestion.quality.text import Dropped, Text, Verdict

__all__ = ["Function", "Language"]

_LABEL = "__label__"


class Language(Filter, frozen=True, kw_only=True, tag="language"):
    """Keeps texts in some languages, as a model in the format of fastText tells them."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    """Path of the model, such as `lid.176.bin`; the library comes with `pip install 'llm-datastore[quality]'`."""

    languages: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """As the model calls them: `en`, or with some models `eng_Latn`."""

    min_score: Share = 0.65
    """Of the most likely language."""

    @override
    def apply(self, text: Text) -> Verdict:
        labels, scores = _model(self.model).predict(text.text.replace("\n", " "))
        if not labels:
            return Dropped("no_language")
        if labels[0].removeprefix(_LABEL) not in self.languages:
            return Dropped("other_language")
        return Dropped("unsure") if scores[0] < self.min_score else text

    @override
    def identity(self) -> str:
        _model(self.model)
        return digest_hex(Path(self.model).read_bytes())


@cache
def _model(path: str) -> Any:
    try:
        import fasttext  # noqa: PLC0415 - optional, and not needed for anything else
    except ImportError:
        raise DependencyError(
            "a model of languages needs a library that reads it",
            missing="fasttext",
            hint="pip install 'llm-datastore[quality]'",
        ) from None
    if not Path(path).is_file():
        raise MissingError("no such model of languages", model=path, hint="Name a file on this machine.")
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise ConfigError(f"not a fastText model: {error}", model=path, hint="Name another file.") from None


class Function(Filter, frozen=True, kw_only=True, tag="function"):
    """Keeps what a function of yours returns True for. It is your code, and is run as such."""

    function: Annotated[str, msgspec.Meta(pattern=r"^[\w.]+:\w+$")]
    """`module:name`. It gets the text and a mapping with `id`, `source` and `offset`, and returns whether to keep the document."""

    @override
    def apply(self, text: Text) -> Verdict:
        kept = _function(self.function)(text.text, text.about)
        if type(kept) is not bool:
            raise ConfigError(
                "a filter returned something else than True or False",
                function=self.function,
                returned=repr(kept)[:80],
                document=text.about.get("id", ""),
                hint="Return a bool.",
            )
        return text if kept else Dropped("refused")

    @override
    def identity(self) -> str:
        _function(self.function)
        path = getattr(import_module(self.function.partition(":")[0]), "__file__", None)
        return digest_hex(Path(path).read_bytes()) if path else ""


@cache
def _function(name: str) -> Callable[[str, Mapping[str, Any]], Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise DependencyError("the module of a filter cannot be imported", function=name, missing=error.name) from None
    if not callable(found):
        raise ConfigError("there is no such function", function=name, found=repr(found), hint="Name module:function.")
    function: Callable[[str, Mapping[str, Any]], Any] = found
    return function

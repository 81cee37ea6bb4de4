"""The base of all filters: settings that know how to judge a text.

A filter is a record of settings, named by `use`, with one method. It sees one document at a time and keeps nothing of it, so
that what it decides depends on the document alone: not on the worker, the batch or what came before.
"""

from abc import abstractmethod
from typing import Annotated

import msgspec

from datastore.document import SettingsDocument
from datastore.ingestion.quality.text import Text, Verdict

__all__ = ["Count", "Filter", "Share"]

Share = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Filter(SettingsDocument, frozen=True, kw_only=True, tag_field="use"):
    """One filter and its settings."""

    @abstractmethod
    def apply(self, text: Text) -> Verdict:
        """Return `text`, a changed one, or why it is dropped."""
        raise NotImplementedError

    def identity(self) -> str:
        """Return what decides beside the settings, such as the digest of a file that they name; nothing if it is they alone.

        Raises:
            MissingError: there is no such file or module.
            DependencyError: a library is missing.
        """
        return ""

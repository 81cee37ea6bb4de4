"""A hook that ends its own process with SIGKILL in the middle of one step: the demo's power failure.

It strikes once, which it remembers in a file: a resumed run has the same hooks. It is loaded by its name,
`use = "demo_hook:PullThePlug"`, as any hook of yours would be.
"""

import os
import signal
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from datastore.document import Document
from datastore.training.hooks.base import Hook, RunState

__all__ = ["PullThePlug", "PullThePlugSettings"]


class PullThePlugSettings(Document, frozen=True, kw_only=True):
    """When, and where it is remembered."""

    step: int
    """In the middle of the step after so many."""

    marker: str
    """A file; while it is there nothing happens."""


class PullThePlug(Hook):
    """Kills its process between the backward pass and the update of one step."""

    Settings: ClassVar[type[Document]] = PullThePlugSettings

    def __init__(self, settings: PullThePlugSettings) -> None:
        super().__init__(settings)
        self._step = settings.step
        self._marker = Path(settings.marker)

    @override
    def gradients(self, run: RunState) -> None:
        if run.step == self._step and not self._marker.exists():
            self._marker.write_text("the plug was pulled\n", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

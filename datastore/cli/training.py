"""The line that shows how training goes: redrawn in place on a terminal; elsewhere only what must not be missed."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from datastore.units import format_seconds

if TYPE_CHECKING:  # msgspec takes longer to load than the help takes to print.
    from datastore.train.progress import Progress

__all__ = ["TrainingLine", "line_of"]

_CLEAR = "\r\x1b[K"


class TrainingLine:
    """Shows the progress of a run on stderr; use it as a context."""

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._validation_loss: float | None = None

    def update(self, progress: "Progress") -> None:
        """Show `progress`; notes, and each new validation loss, stay on a line of their own."""
        if not self._shown:
            return
        if progress.note:
            self._keep(progress.note)
        if not self._terminal:
            return
        if progress.validation_loss != self._validation_loss:
            self._validation_loss = progress.validation_loss
            self._keep(line_of(progress))
        sys.stderr.write(_CLEAR + line_of(progress))
        sys.stderr.flush()

    def _keep(self, text: str) -> None:
        sys.stderr.write(f"{_CLEAR if self._terminal else ''}{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            sys.stderr.write(_CLEAR)


def line_of(progress: "Progress") -> str:
    """Return one line about a run; what is not known yet is left out."""
    parts = [
        f"step {progress.step:,}/{progress.steps:,}",
        None if progress.loss is None else f"loss {progress.loss:.4f}",
        None if progress.validation_loss is None else f"validation {progress.validation_loss:.4f}",
        None if progress.tokens_per_s is None else f"{progress.tokens_per_s:,.0f} tokens/s",
        None if progress.data_wait is None else f"waiting for data {progress.data_wait:.1%}",
        None if progress.eta_s is None else f"{format_seconds(progress.eta_s)} left",
    ]
    return "  ".join(part for part in parts if part)

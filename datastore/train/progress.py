"""What a running and a finished run tell: records that go to a progress line, to another process, or to `--json`."""

from datastore.document import Document

__all__ = ["Progress", "Result"]


class Progress(Document, frozen=True, kw_only=True):
    """A line about a run; sent a few times a second at most, and for every note."""

    step: int
    steps: int
    loss: float | None = None
    validation_loss: float | None = None
    """The last one measured."""

    tokens_per_s: float | None = None
    """Over the last few steps, all ranks together."""

    data_wait: float | None = None
    """Fraction of the time in which ranks waited for data, over the last few steps."""

    eta_s: float | None = None
    note: str = ""
    """Something that happened: resumed, saved, a damaged checkpoint passed over. Worth a line of its own."""


class Result(Document, frozen=True, kw_only=True):
    """How a session ended."""

    run: str
    step: int
    steps: int
    resumed_from: int
    """0: from the beginning."""

    stopped: bool
    """Whether a signal ended it before the last step; everything up to `step` is saved."""

    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    """Mean over the session's steps, without evaluations and saves."""

    data_wait: float | None
    """Fraction of that time in which ranks waited for data."""

    seconds: float
    """Of the whole session, from reading the settings to the last byte saved."""

    world: int
    parameters: int

"""The request for a session, as `start` hands it to each rank: as JSON, where that is another process."""

from datastore.document import Document
from datastore.training.settings import Settings

__all__ = ["SessionRequest"]


class SessionRequest(Document, frozen=True, kw_only=True):
    """What a session is to do; the same on every rank."""

    run: str
    """URL of the run folder."""

    settings: Settings
    fresh: bool
    """Whether the run may be new; if not, it must exist."""

    take_over: bool = False
    """Whether to take the lock of a process of another machine, which is known to be gone."""

"""How ranks agree on which step they restore: none may take one that another could not verify.

An agreement is a function that every rank calls with a number, equally often, and that returns the least of them on
every rank. That is enough for everything: the newest step that all can see, whether all found it sound (0 or 1), and
whether all mean the same save. A trainer passes an all-reduce of its process group; without one the ranks meet in
storage, at the price of one tiny file per rank and question.
"""

from collections.abc import Callable
from itertools import count

from datastore.checkpoint.format.manifest import VOTES
from datastore.checkpoint.ranks import Member
from datastore.checkpoint.waiting import wait_until
from datastore.errors import ConflictError, MissingError, WaitError

__all__ = ["Agree", "StorageVote", "all_equal"]

Agree = Callable[[int], int]
"""Return the least of the numbers that the ranks call this with; a collective operation."""


class StorageVote:
    """An agreement through files. Each launch needs a session of its own, or it would read the votes of the last one."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._numbers = count()

    def __call__(self, value: int) -> int:
        """Return the least `value` of all ranks.

        Raises:
            WaitError: some ranks did not vote in time; the message names them.
            ConflictError: this rank's vote is there already, so another process has the same session and rank.
        """
        if self._member.world == 1:
            return value
        number = next(self._numbers)
        try:
            self._member.storage.put_new(self._key(number, self._member.rank), str(value).encode())
        except ConflictError:
            hint = "Give each launch a session of its own, and each process its own rank."
            raise ConflictError(
                "another process voted in this place", session=self._member.session, hint=hint
            ) from None
        found: list[int] = []

        def next_missing() -> list[int] | None:
            for rank in range(len(found), self._member.world):
                vote = self._read(number, rank)
                if vote is None:
                    return None
                found.append(vote)
            return found

        if wait_until(next_missing, timeout_s=self._member.options.wait_s) is None:
            late = [rank for rank in range(self._member.world) if self._read(number, rank) is None]
            hint = "Check those processes; all ranks must call restore."
            raise WaitError("ranks did not take part in the restore in time", ranks=late, hint=hint)
        return min(found)

    def _key(self, number: int, rank: int) -> str:
        return f"{VOTES}/{self._member.session}/{number:06d}-{rank:05d}"

    def _read(self, number: int, rank: int) -> int | None:
        try:
            return int(self._member.storage.get(self._key(number, rank)))
        except MissingError:
            return None


def all_equal(agree: Agree, value: int) -> bool:
    """Return, on every rank, whether all of them called this with the same `value`."""
    least, greatest = agree(value), -agree(-value)
    return least == greatest

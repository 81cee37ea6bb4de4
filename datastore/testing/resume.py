"""A check for anything that iterates and can be resumed: this package's loader, or yours.

check_resumes_everywhere(lambda state: open_my_loader(state), steps=25)
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

__all__ = ["Resumable", "check_resumes_everywhere"]

T_co = TypeVar("T_co", covariant=True)
State = Mapping[str, Any]


class Resumable(Protocol[T_co]):
    """An iterator that says where it stands."""

    def __next__(self) -> T_co:
        """Return the next item."""
        ...

    def state_dict(self) -> State:
        """Return what `open_at` needs to go on after the last item returned."""
        ...


def check_resumes_everywhere(
    open_at: Callable[[State | None], Resumable[Any]], *, steps: int, value: Callable[[Any], object] | None = None
) -> None:
    """Stop after every step, resume from the saved state, and compare what follows, up to `steps` items or the end.

    One resume point is not evidence: off-by-one errors hide at batch, shard and epoch borders, so choose `steps` large
    enough to cross one of each. `open_at(None)` starts at the beginning. Items are compared by `value`, by default
    their `fingerprint()` if they have one, else themselves. Takes O(steps^2) items.

    Raises:
        AssertionError: what follows differs; the message names the step.
    """
    whole, states = _run(open_at(None), steps, value or _value)
    for step, state in enumerate(states):
        rest, _ = _run(open_at(state), steps - step, value or _value)
        wrong = next(
            (index for index, pair in enumerate(zip(rest, whole[step:], strict=False)) if pair[0] != pair[1]), None
        )
        assert wrong is None, f"resumed at step {step}, item {step + wrong} differs from the undisturbed run's"
        assert len(rest) == len(whole) - step, (
            f"resumed at step {step}, it gave items up to {step + len(rest)}, not {len(whole)}"
        )


def _run(items: Resumable[Any], steps: int, value: Callable[[Any], object]) -> tuple[list[object], list[State]]:
    """Return the values of at most `steps` items, and the state before each of them and after the last."""
    values: list[object] = []
    states: list[State] = [dict(items.state_dict())]
    for _ in range(steps):
        try:
            values.append(value(next(items)))
        except StopIteration:
            break
        states.append(dict(items.state_dict()))
    return values, states


def _value(item: Any) -> object:
    fingerprint = getattr(item, "fingerprint", None)
    return fingerprint() if callable(fingerprint) else item

"""What the system tests of checkpoints run in processes of their own, to kill them or to fill their disk.

    python checkpoint_programs.py kill FOLDER ROUNDS SEED WORLD
    python checkpoint_programs.py full FOLDER
    python checkpoint_programs.py limited FOLDER BYTES

The killer forks its victims and its judges instead of starting Python for each: torch is imported once, so hundreds
of kills take minutes.
"""

import os
import random
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.errors import DatastoreError

State = dict[str, dict[str, torch.Tensor | int]]

FLOATS = 300_000
"""Of the largest tensor: a save takes some ten milliseconds, and a kill finds it anywhere in between."""


def state(value: int) -> State:
    """A state in which every number is `value`, but for a tensor that never changes."""
    sizes = (FLOATS, 70_000, 1000, 1, 5)
    tensors = {f"t{i}": torch.full((size,), float(value)) for i, size in enumerate(sizes)}
    return {"model": {**tensors, "frozen": torch.full((50_000,), 7.0)}, "data": {"cursor": value}}


def numbers_in(items: State) -> set[float]:
    """Return every number in `items` but those that never change."""
    found = {float(items["data"]["cursor"])}
    for name, tensor in items["model"].items():
        assert isinstance(tensor, torch.Tensor)
        if name == "frozen":
            assert tensor.eq(7).all(), "the frozen tensor has changed"
        else:
            found |= {tensor.min().item(), tensor.max().item()}
    return found


def open_run(folder: str, rank: int, world: int, session: str) -> Checkpointer:
    options = CheckpointerSettings(wait_s=60)
    return Checkpointer(folder, keep=Keep(last=2), rank=rank, world=world, session=session, options=options)


def victim(folder: str, rank: int, world: int, session: str, report: Callable[[str], None]) -> None:
    """Go on from the newest step for ever; report each step that is about to be saved and each that is committed."""
    ck = open_run(folder, rank, world, session)
    items, step = state(0), 0
    report("ready")
    if session != "first":
        step = ck.restore(items).step
    while True:
        step += 1
        for name, tensor in items["model"].items():
            if name != "frozen":
                tensor.fill_(float(step))  # type: ignore[union-attr]
        items["data"]["cursor"] = step
        report(f"try {step}")
        handle = ck.save(step, items, blocking=step % 3 == 0)
        handle.committed(timeout_s=60)
        report(f"done {step}")


def judge(folder: str, lowest: int, highest: int, report: Callable[[str], None]) -> None:
    """Restore the newest step and report it; raise unless it is whole and neither lost nor from the future."""
    items = state(-1)
    with Checkpointer(folder) as ck:
        info = ck.restore(items)
        found = ck.verify(info.step)
    assert not info.fell_back, f"step {info.fell_back} was not whole"
    assert numbers_in(items) == {float(info.step)}, f"step {info.step} holds {numbers_in(items)}"
    assert lowest <= info.step <= highest, f"{lowest} was committed, {highest} was tried, {info.step} is there"
    assert not found.bad, found
    report(f"found {info.step}")


def fork(work: Callable[[], None]) -> int:
    """Return the id of a child that does `work` and exits with 0, or 1 if it raised."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:  # noqa: BLE001 - a child must not go on with what its parent was doing
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def kill(folder: str, rounds: int, seed: int, world: int) -> None:
    """Let `world` victims save, kill them at a random moment, judge what is left; `rounds` times."""
    chance = random.Random(seed)
    lowest = highest = 0
    for round_ in range(rounds):
        session = "first" if round_ == 0 else f"s{seed}-{round_}"
        reading, report = reporting()
        victims = [
            fork(lambda rank=rank, session=session, report=report: victim(folder, rank, world, session, report))
            for rank in range(world)
        ]
        os.close(report.args[0])
        heard = wait_for(reading, b"done" if round_ == 0 else chance.choice([b"ready", b"try", b"done"]))
        threading.Event().wait(chance.uniform(0, 0.08))
        chance.shuffle(victims)
        for child in victims:
            os.kill(child, signal.SIGKILL)
            threading.Event().wait(chance.choice([0, 0.01]))
        for child in victims:
            os.waitpid(child, 0)
        words = (heard + rest_of(reading)).split()
        lowest = max([lowest, *(int(step) for word, step in pairwise(words) if word == b"done")])
        highest = max([highest, *(int(step) for word, step in pairwise(words) if word == b"try")])
        reading, report = reporting()
        judged = fork(lambda low=lowest, high=highest, report=report: judge(folder, low, high, report))
        os.close(report.args[0])
        words = rest_of(reading).split()
        _, status = os.waitpid(judged, 0)
        if status:
            sys.exit(f"round {round_} of seed {seed}: the run is broken")
        lowest = int(words[1])
    say(f"{rounds} kills, {lowest} steps")


def reporting() -> tuple[int, partial[None]]:
    """Return where to read what is reported, and a function that reports one line."""
    reading, writing = os.pipe()
    return reading, partial(say_to, writing)


def say_to(fd: int, line: str) -> None:
    os.write(fd, f"{line}\n".encode())


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wait_for(fd: int, word: bytes) -> bytes:
    heard = b""
    deadline = time.monotonic() + 60
    while word not in heard:
        assert select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0], f"nobody said {word!r}: {heard!r}"
        said = os.read(fd, 65536)
        assert said, f"the victims are gone: {heard!r}"
        heard += said
    return heard


def rest_of(fd: int) -> bytes:
    """Return what is still said, until everybody has gone."""
    heard = b""
    while said := os.read(fd, 65536):
        heard += said
    os.close(fd)
    return heard


def save_until_full(folder: str) -> None:
    """Save a growing state until the disk is full; print the step that was saved last and the error."""
    ck = Checkpointer(folder, keep=Keep(last=2))
    step = 0
    try:
        while True:
            step += 1
            size = step * 100_000
            ck.save(step, {"model": {"w": torch.full((size,), float(step))}}).committed(timeout_s=60)
    except DatastoreError as error:
        say(f"{step - 1}|{error.code}|{error}")
    ck.close()


if __name__ == "__main__":
    action, folder, *rest = sys.argv[1:]
    if action == "kill":
        kill(folder, *(int(number) for number in rest))
    elif action == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest[0]), int(rest[0])))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save_until_full(folder)
    else:
        save_until_full(folder)

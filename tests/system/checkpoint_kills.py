"""Kills programs that save at random moments, and holds what can be restored against what was saved.

    python checkpoint_kills.py FOLDER [--kills N] [--seed N] [--only NAME,...] [--to URL] [--far URL]

A program restores the newest step, goes on from there, saves step after step, and lets old ones go; the numbers in its state
follow from the step. It is ended by SIGKILL after a random time: in a save, in one in the background, in a collection, or with
two ranks one of them or both; or while it copies to a second place, after which every fifth time the first one is lost. Then every step that the run lists must be whole, the newest must be one that was saved, not older
than the last one that a program heard was committed, and restore to the same bits; and the next program goes on from it. With `--far`
each run of one rank has a second place there, to which the same applies; and once what is missing has been copied, the newest step of the first restores to the same bits from the second.

Programs are forks of this process, which has loaded torch and has no threads, so that a kill costs tens of milliseconds.
"""

import argparse
import json
import os
import random
import select
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.items import PerRank
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.places.two import TwoPlaces
from datastore.checkpoint.replica import replicate
from datastore.checkpoint.steps import CheckpointerSettings, StepLog
from datastore.errors import DatastoreError
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url

KINDS = ("save", "background", "collect", "ranks", "replicate")

STEPS = 10_000
"""More than a program gets to."""


def state_of(step: int, rank: int) -> dict[str, Any]:
    """Return the state at `step`: some tensors change at each, one at every third, one never."""
    shapes = {"weights": (300, 211), "bias": (7,), "moments": (2, 300, 211)}
    changing = {name: torch.full(shape, float(step)) + torch.arange(shape[-1]) for name, shape in shapes.items()}
    rare = torch.arange(20_000, dtype=torch.int64) + step // 3
    frozen = torch.arange(50_000, dtype=torch.float32)
    own = {"rank": rank, "noise": torch.arange(64, dtype=torch.float64) * (step + 1) + rank}
    model = {**changing, "rare": rare, "frozen": frozen, "step": step}
    return {"model": model, "own": PerRank(own)}


def blank(rank: int) -> dict[str, Any]:
    """Return a state of the same shape with other numbers."""
    return state_of(10**6 + 3, rank)


def same(left: Any, right: Any) -> bool:
    """Return whether two states are the same to the bit."""
    if isinstance(left, PerRank):
        return isinstance(right, PerRank) and same(left.state, right.state)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    return bool(left == right)


def program(url: str, kind: str, *, rank: int, world: int, session: str, tell: int) -> None:
    """Go on from the newest step until somebody ends this process; write each step that is committed to `tell`."""
    keep = Keep(last=1 if kind == "collect" else 2, every=7)
    options = CheckpointerSettings(wait_s=1.5, in_flight_bytes=2**24 if kind == "replicate" else 0)
    place = TwoPlaces(url, far_of(url), keep=keep) if has_two_places(url) else url
    with Checkpointer(place, keep=keep, rank=rank, world=world, session=session, options=options) as ck:
        items, step = blank(rank), -1
        if ck.latest() is not None:
            step = ck.restore(items).step
        os.write(tell, b"-1 first\n")
        for now in range(step + 1, STEPS):
            for item, wanted in state_of(now, rank).items():
                put(items[item], wanted)
            handle = ck.save(now, items, blocking=kind == "save" or (kind == "collect" and now % 2 == 0))
            if kind == "collect":
                ck.gc()
            with ck.guard():
                pass
            if has_two_places(url) and now % 3 == 0:
                handle.replicated()
                os.write(tell, f"{now} both\n".encode())
            elif kind in {"save", "ranks"} or now % 3 == 1:
                handle.committed()
                os.write(tell, f"{now} first\n".encode())


FAR: list[str] = []
"""Where all second places are, if it is said."""


def has_two_places(url: str) -> bool:
    """Return whether the run at `url` has a second place."""
    return "replicate-" in url or bool(FAR and "ranks-" not in url)


def far_of(url: str) -> str:
    """Return the second place of a run."""
    return join_url(FAR[0], url.rstrip("/").rpartition("/")[2]) if FAR else f"{url}-far"


def put(item: Any, wanted: Any) -> None:
    """Change a state in place, as training does."""
    here, there = (item.state, wanted.state) if isinstance(item, PerRank) else (item, wanted)
    for key, value in there.items():
        if isinstance(value, torch.Tensor):
            here[key].copy_(value)
        else:
            here[key] = value


def check(url: str, heard: dict[str, int]) -> None:
    """Hold every step that is listed against what was saved.

    Raises:
        AssertionError: something is not as it was saved, or lost.
    """
    if not has_two_places(url):
        check_place(url, heard["first"])
        return
    check_place(far_of(url), heard["both"])
    check_place(url, heard["first"], lost="replicate-" in url)
    if FAR and open_log(url).steps():
        replicate(url, far_of(url), keep=Keep(last=3))
        check_place(far_of(url), max(open_log(url).steps()))


def open_log(url: str) -> StepLog:
    return StepLog(open_storage(url))


def check_place(url: str, heard: int, *, lost: bool = False) -> None:
    """Hold the steps of one place against what was saved; a first place that was `lost` may have none."""
    with Checkpointer(url) as ck:
        steps = ck.steps()
        for step in steps:
            report = ck.verify(step)
            assert not report.bad, f"step {step}: {report.bad}"
        newest = max(steps, default=-1)
        assert newest >= heard or (lost and not steps), f"step {heard} was committed, and the newest is {newest}"
        if steps:
            items = {"model": blank(0)["model"]}
            assert ck.restore(items, partial=True, fresh=newest % 2 == 0).step == newest
            assert same(items["model"], state_of(newest, 0)["model"]), f"step {newest} has other bits"


def fork(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except DatastoreError as error:  # Another rank was ended.
        code = 2 if "rank" in str(error) else 1
        if code == 1:
            sys.stderr.write(f"{error}\n")
    except BaseException as error:  # noqa: BLE001 - told, and the process ends
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_once(url: str, kind: str, heard: dict[str, int], rng: random.Random) -> str:
    """Run a program and end it; note in `heard` the last step that it heard was in the first place, and in both; return what was killed."""
    world = 2 if kind == "ranks" else 1
    session = uuid.UUID(int=rng.getrandbits(128)).hex
    reads, tell = os.pipe()
    ranks = [
        fork(lambda rank=rank: program(url, kind, rank=rank, world=world, session=session, tell=tell))  # type: ignore[misc]
        for rank in range(world)
    ]
    os.close(tell)
    if rng.random() < 0.9:  # Else it is killed while it starts, or restores.
        select.select([reads], [], [], 60)
    time.sleep(rng.uniform(0.02, 0.5 if "://" not in f"{url}{FAR}" else 1.5))
    victims = rng.sample(ranks, rng.choice((1, 2)) if world == 2 else 1)
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert all(code in {-signal.SIGKILL, 2} for code in codes), f"{kind}: a program ended by itself: {codes}"
    with os.fdopen(reads, "rb") as told:
        for line in told.read().splitlines():
            step, where = line.decode().split()
            for place in ("first", "both") if where == "both" else ("first",):
                heard[place] = max(heard[place], int(step))
    return f"{kind}{' (one rank)' if world == 2 and len(victims) == 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--to", default="")
    parser.add_argument("--far", default="")
    options = parser.parse_args()
    FAR.extend([options.far] if options.far else [])
    if options.to or options.far:
        import_module("botocore.session")  # Else each program does so.
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    kinds = options.only.split(",")
    done = 0
    while done < options.kills:
        kind = kinds[done // 25 % len(kinds)]
        url = join_url(options.to or options.folder, f"{kind}-{done // 25}")
        heard = {"first": -1, "both": -1}
        for _ in range(min(25, options.kills - done)):
            done += 1
            counts[kill_once(url, kind, heard, rng)] += 1
            checker = fork(lambda: check(url, heard))  # noqa: B023 - it has ended before they change
            code = os.waitstatus_to_exitcode(os.waitpid(checker, 0)[1])
            assert code == 0, f"seed {options.seed}, after {dict(counts)}, {url}"
            if kind == "replicate" and rng.random() < 0.2:
                loser = fork(lambda: empty(url))  # noqa: B023
                os.waitpid(loser, 0)
                counts["first place lost"] += 1
                heard["first"] = heard["both"]
        for place in (url, far_of(url)) if has_two_places(url) else (url,):
            cleaner = fork(lambda: empty(place))  # noqa: B023
            os.waitpid(cleaner, 0)
        sys.stdout.write(json.dumps({"steps": heard["first"], **counts}) + "\n")
        sys.stdout.flush()


def empty(url: str) -> None:
    storage = open_storage(url)
    for each in list(storage.list()):
        storage.delete(each.key)


if __name__ == "__main__":
    main()

"""Kills operations on datasets, and looks at what is left: the old or the new version, whole, and a way on from there.

    python crash_program.py FOLDER_OR_URL [--kills N] [--seed N] [--only NAME,...]

Each operation works on a fresh copy of a prepared workspace, in a forked child. Three kills of four are exact: the child
ends itself with SIGKILL right before its n-th call that changes something (a system call on this machine, a request on
an object store). Without `--kills` there is one for each n, so every state that a crash can leave is visited. The fourth
comes from outside after a random time, which also hits the middle of such calls. Then, in another child:

1. every dataset of the workspace opens and verifies, decoded, or is not there if it was not there before;
2. it holds exactly what it held before the operation or what it holds after one that nobody killed;
3. each version that was there and can still be opened holds what it held;
4. running the operation again completes it.

Nothing but forking touches storage in this process: a client of an object store does not survive a fork.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa

from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.manifest import oldest_readable
from datastore.dataset.log.tags import list_tags, read_tag, remove_tag, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.clone import clone
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.copy import copy
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.operations.vacuum import vacuum
from datastore.dataset.roots import create_at, place_dataset
from datastore.dataset.shards.files import put_tokenizer
from datastore.dataset.shards.parity_groups import load_groups
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import MissingError
from datastore.ingestion.importing import import_dataset
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.interop.export import export
from datastore.storage.backends.local import LocalStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url
from datastore.testing.examples import make_shard

with suppress(ImportError):
    # pyarrow imports it when it first sees an array, which would be once in each child.
    importlib.import_module("pandas")

SCHEMA = pa.schema({"text": pa.string(), "n": pa.int64()})

# ---- What is killed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """`run` works on the datasets of the workspace at a URL, which `prepare` has made."""

    run: Callable[[str], object]
    prepare: Callable[[str], object]
    sets: tuple[str, ...] = ("set",)
    """The datasets of the workspace."""

    repeatable: bool = True
    """Whether running it once more after it is done changes nothing."""

    unseen: bool = False
    """Whether readers see no difference: only files go that nobody can read, or come back that were lost."""

    damaged: bool = False
    """Whether the datasets do not verify before it."""

    tags_last: bool = False
    """Whether tags follow the commit: until it is run again, they may be missing, or name versions that have expired."""

    local: bool = False
    """Whether it needs disks of this machine."""


def shards_of(storage: Storage, name: int, lengths: list[list[int]]) -> list[Any]:
    return [make_shard(storage, f"{name:016x}{index:016x}", lengths=each) for index, each in enumerate(lengths)]


def add_tokens(url: str, name: int, *, operation: str = "append", lengths: list[list[int]] | None = None) -> None:
    storage, _ = create_at(url)
    tokenizer = put_tokenizer(storage, b'{"model": "tiny"}', vocab_size=2**16, end_of_text=0)
    shards = shards_of(storage, name, lengths or [[3, 5, 0, 40], [7, 2]])
    commit_shards(storage, shards, tokenizer=tokenizer, operation=operation)  # type: ignore[arg-type]


def two_versions(workspace: str) -> None:
    add_tokens(join_url(workspace, "set"), 1)
    add_tokens(join_url(workspace, "set"), 2)
    dataset = open_dataset(join_url(workspace, "set"), version=2)
    set_tag(dataset.storage, "first", dataset.commit)


def some_deleted(workspace: str) -> None:
    two_versions(workspace)
    delete(join_url(workspace, "set"), ids=[name(1, 0, 1), name(2, 1, 0)])


def name(shards: int, index: int, row: int) -> str:
    """Return the id of a document of `add_tokens`."""
    return f"{f'{shards:016x}{index:016x}'[:8]}-{row}"


def records(workspace: str) -> None:
    add_records(workspace, "a")
    add_records(workspace, "b")


def add_records(workspace: str, text: str) -> None:
    with record_writer(join_url(workspace, "set"), schema=SCHEMA) as out:
        out.write({"text": f"{text}{index}", "n": index} for index in range(50))


def ingest_texts(workspace: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The same place for each child, or the second run would have other sources.
        texts = Path(folder).parent / "crash-program-texts"
        texts.mkdir(exist_ok=True)
        for index in range(4):
            path = texts / f"{index}.txt"
            if not path.exists():
                path.write_text(f"text {index} " * 30)
    settings = IngestSettings(workers=1, task_bytes=10_000, shard_bytes=1024)
    ingest([str(texts)], join_url(workspace, "set"), settings=settings)


def on_set(run: Callable[[str], object]) -> Callable[[str], object]:
    return lambda workspace: run(join_url(workspace, "set"))


def nothing(workspace: str) -> None:
    """Prepare an empty workspace."""


def move_tag(url: str) -> None:
    dataset = open_dataset(url, version=1)
    set_tag(dataset.storage, "first", dataset.commit, replace=True)


def expired(workspace: str) -> None:
    two_versions(workspace)
    url = join_url(workspace, "set")
    add_tokens(url, 4, operation="overwrite")
    remove_tag(open_storage(url), "first")
    expire(url, keep_last=1)


def vacuum_all(workspace: str) -> None:
    if "://" in workspace:
        time.sleep(1.1)  # Object stores tell time in seconds, and what is as old as the present is not older.
    vacuum(join_url(workspace, "set"), dry_run=False, older_than_s=0)


def protected(workspace: str) -> None:
    two_versions(workspace)
    protect(join_url(workspace, "set"), width=3)


def damaged(workspace: str) -> None:
    """One file of each parity group is gone or damaged."""
    protected(workspace)
    dataset = open_dataset(join_url(workspace, "set"))
    for ref in dataset.commit.parity:
        for index, group in enumerate(load_groups(dataset.storage, ref)):
            path = group.members[index % len(group.members)].path
            raw = dataset.storage.get(path)
            if index % 2:
                dataset.storage.put(path, raw[:-1] + bytes([raw[-1] ^ 1]))
            else:
                dataset.storage.delete(path)


def mirrored(workspace: str) -> None:
    place_dataset(join_url(workspace, "set"), roots=[join_url(workspace, "other")], copies=2)
    two_versions(workspace)


def lost_disk(workspace: str) -> None:
    mirrored(workspace)
    shutil.rmtree(join_url(workspace, "other"))


def replace_disk(workspace: str) -> None:
    other = join_url(workspace, "other")
    repair(join_url(workspace, "set"), roots={other: other})


def exported(workspace: str) -> None:
    two_versions(workspace)
    export(open_dataset(join_url(workspace, "set")), join_url(workspace, "mds"), format="mds")


def import_mds(workspace: str) -> None:
    settings = IngestSettings(workers=1, shard_bytes=1024)
    import_dataset(join_url(workspace, "mds"), join_url(workspace, "new"), format="mds", settings=settings)


def add_column(url: str) -> None:
    evolve(url, add={"score": "float32"}, defaults={"score": 0.5}, drop=["n"])


def copy_set(workspace: str) -> None:
    copy(join_url(workspace, "set"), join_url(workspace, "new"), all_versions=True)


def copied_before(workspace: str) -> None:
    two_versions(workspace)
    copy_set(workspace)
    add_tokens(join_url(workspace, "set"), 3)


OPERATIONS: dict[str, Operation] = {
    "create": Operation(on_set(lambda url: add_tokens(url, 1)), nothing),
    "append": Operation(on_set(lambda url: add_tokens(url, 3)), some_deleted),
    "append records": Operation(lambda workspace: add_records(workspace, "c"), records, repeatable=False),
    "append to mirrors": Operation(on_set(lambda url: add_tokens(url, 3)), mirrored, sets=("set", "other"), local=True),
    "overwrite": Operation(
        on_set(lambda url: add_tokens(url, 3, operation="overwrite")), some_deleted, repeatable=False
    ),
    "ingest": Operation(ingest_texts, nothing),
    "import": Operation(import_mds, exported, sets=("set", "new")),
    "tag": Operation(on_set(move_tag), two_versions),
    "delete": Operation(on_set(lambda url: delete(url, ids=[name(1, 0, 3), name(2, 0, 0)])), some_deleted),
    "purge": Operation(on_set(lambda url: purge(url, drop_tags=True)), some_deleted, tags_last=True),
    "compact": Operation(on_set(lambda url: compact(url, target_bytes=4000)), some_deleted),
    "compact records": Operation(on_set(compact), records),
    "evolve": Operation(on_set(add_column), records),
    "expire": Operation(on_set(lambda url: expire(url, keep_last=1)), some_deleted),
    "vacuum": Operation(vacuum_all, expired, unseen=True),
    "clone": Operation(
        lambda workspace: clone(join_url(workspace, "set"), join_url(workspace, "new")),
        some_deleted,
        sets=("set", "new"),
    ),
    "clone in name only": Operation(
        lambda workspace: clone(join_url(workspace, "set"), join_url(workspace, "new"), shallow=True),
        some_deleted,
        sets=("set", "new"),
    ),
    "copy": Operation(copy_set, some_deleted, sets=("set", "new"), tags_last=True),
    "copy again": Operation(copy_set, copied_before, sets=("set", "new"), tags_last=True),
    "protect": Operation(on_set(lambda url: protect(url, width=3)), two_versions),
    "repair by parity": Operation(on_set(repair), damaged, unseen=True, damaged=True),
    "repair a mirror": Operation(replace_disk, lost_disk, unseen=True, damaged=True, local=True),
}

# ---- What is left ---------------------------------------------------------------------------------------------------

State = Any
"""What a reader can be handed of a workspace: plain values, so that two of them can be compared."""


def content(dataset: Dataset) -> str:
    """Return the digest of all live documents of a version, in order, whatever shards they lie in."""
    state = hashlib.sha256(dataset.kind.encode())
    for index in range(len(dataset.segments)):
        live = dataset.live_rows(index)
        if dataset.kind == "records":
            state.update(repr(dataset.live_records(index).to_pylist()).encode())
            continue
        values, offsets = dataset.token_shard(index)
        rows = range(offsets.size - 1) if live is None else np.flatnonzero(live)
        documents = dataset.live_documents(index).to_pylist()
        for row, document in zip(rows, documents, strict=True):
            state.update(repr(document).encode() + values[offsets[row] : offsets[row + 1]].tobytes())
    return state.hexdigest()


def state_of(workspace: str, sets: tuple[str, ...]) -> State:
    """Return what the datasets hold, after verifying them; None for one that is not there."""
    return {each: set_state(join_url(workspace, each)) for each in sets}


def set_state(url: str) -> State:
    try:
        newest = open_dataset(url)
    except MissingError:
        return None
    report = verify(newest, deep=True)
    assert report.ok, report.bad
    oldest = oldest_readable(newest.info, newest.commit)
    versions = {
        str(version): content(open_dataset(url, version=version)) for version in range(oldest, newest.version + 1)
    }
    tags = {tag: read_tag(newest.storage, tag).version for tag in list_tags(newest.storage)}
    totals = newest.totals
    facts = [totals.shards, totals.documents, totals.deleted_documents, totals.deleted_tokens, newest.commit.operation]
    return {"content": content(newest), "facts": facts, "tags": tags, "versions": versions}


def without_tags(state: State) -> State:
    return {each: holds and {**holds, "tags": None} for each, holds in state.items()}


def files_of(workspace: str) -> list[str]:
    return [stat.key for stat in open_storage(workspace).list()]


def check(workspace: str, operation: Operation, old: State, new: State, gone: list[str]) -> str:
    """Return which of the two states the workspace is in, and leave it in the new one."""
    found = old if operation.damaged else state_of(workspace, operation.sets)
    for each in operation.sets:
        before = old[each]["versions"] if old and old[each] else {}
        now = found[each]["versions"] if found and found[each] else {}
        assert all(now[version] == before[version] for version in now.keys() & before.keys()), "an old version changed"
    if operation.tags_last and without_tags(found) == without_tags(new):
        found = new
    assert found in (old, new), f"neither old nor new: {found}\nold: {old}\nnew: {new}"
    if found == old or operation.repeatable:
        operation.run(workspace)
        again = state_of(workspace, operation.sets)
        assert again == new, f"run again: {again}\nnew: {new}"
        left = sorted(set(gone) & set(files_of(workspace)))
        left += [key for key in files_of(workspace) if "purges/plans/" in key]
        assert not left, f"run again, and still there: {left}"
    return "new" if found == new else "old"


# ---- How it is killed -----------------------------------------------------------------------------------------------

CHANGES = {"write", "writev", "pwrite", "pwritev", "fdatasync", "fsync", "link", "replace", "rename"}
CHANGES |= {"unlink", "remove", "rmdir", "mkdir", "symlink", "ftruncate", "truncate", "sendfile", "copy_file_range"}
"""System calls as Python names them; opening a file changes nothing that another process can see."""


@dataclass
class Killer:
    """Ends this process before its change number `at`, counted from 1 over all threads."""

    at: int
    counter: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    last: int = 0

    def change(self) -> None:
        self.last = next(self.counter)
        if self.last == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, workspace: str) -> None:
        """Count the changes of this process from now on."""
        if isinstance(open_storage(workspace), LocalStorage):
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)
        else:
            self._wrap(type(open_storage(workspace)))

    def _profile(self, _frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__module__", "") == "posix" and function.__name__ in CHANGES:  # type: ignore[attr-defined]
            self.change()

    def _wrap(self, storage: type[Storage]) -> None:
        for verb in ("put", "put_new", "delete"):
            inner = getattr(storage, verb)

            def wrapped(*arguments: Any, inner: Callable[..., Any] = inner) -> Any:
                self.change()
                return inner(*arguments)

            setattr(storage, verb, wrapped)


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked child, as JSON carries it; None if the child was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as pipe:
                json.dump(work(), pipe)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - as above
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        return None
    if status:
        sys.exit("a child failed; see above")
    return json.loads(text)


def killed_at(workspace: str, operation: Operation, at: int) -> int | None:
    """Run `operation` and kill it before change `at`; return how many changes there were if it came to its end."""

    def work() -> int:
        killer = Killer(at)
        killer.watch(workspace)
        operation.run(workspace)
        sys.setprofile(None)
        return killer.last

    found: int | None = in_child(work)
    return found


def killed_after(workspace: str, operation: Operation, seconds: float) -> bool:
    """Run `operation` and kill it from outside after `seconds`; return whether it was still running."""
    child = os.fork()
    if not child:
        try:
            operation.run(workspace)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - as above
            traceback.print_exc()
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in {0, -signal.SIGKILL}:
        sys.exit("an operation failed; see above")
    return status != 0


def fresh(base: str, workspace: str) -> None:
    """Make `workspace` a copy of `base`."""
    source = open_storage(base)
    if isinstance(source, LocalStorage):
        shutil.rmtree(workspace, ignore_errors=True)
        # Nothing of a dataset is ever changed in place, so names of the same files will do.
        shutil.copytree(base, workspace, copy_function=os.link)
        return
    target = open_storage(workspace)
    for stat in list(target.list()):
        target.delete(stat.key)
    for stat in source.list():
        target.put(stat.key, source.get(stat.key))


def torment(root: str, title: str, operation: Operation, kills: int | None, seed: int) -> dict[str, Any]:
    """Kill `operation` so often, or before each of its changes; return what was found."""
    base, workspace = join_url(root, "base"), join_url(root, "work")
    if "://" not in root:
        Path(workspace).mkdir(parents=True)
    # What is prepared has whole paths in it, so it is made where it will be used.
    in_child(lambda: operation.prepare(workspace))
    old = None if operation.damaged else in_child(lambda: state_of(workspace, operation.sets))
    in_child(lambda: fresh(workspace, base))
    before = in_child(lambda: files_of(workspace))
    started = time.perf_counter()
    points = killed_at(workspace, operation, at=0)
    assert points, f"{title} changes nothing"
    seconds = time.perf_counter() - started
    new = in_child(lambda: state_of(workspace, operation.sets))
    assert operation.unseen or new != old, f"{title} makes no difference"
    gone = sorted(set(before) - set(in_child(lambda: files_of(workspace))))
    generator = random.Random(f"{title}/{seed}")
    kills = points + points // 3 if kills is None else kills
    exact = kills - kills // 4
    order = [point for _ in range(-(-exact // points)) for point in generator.sample(range(1, points + 1), points)]
    found = {"old": 0, "new": 0}
    for kill in range(kills):
        in_child(lambda: fresh(base, workspace))
        if kill < exact:
            # Threads may make a change more or less than the first time; then the last points are never reached.
            killed_at(workspace, operation, at=order[kill])
        else:
            killed_after(workspace, operation, generator.uniform(0, seconds))
        found[in_child(lambda: check(workspace, operation, old, new, gone))] += 1
    if "://" not in root:
        shutil.rmtree(root)
    return {"operation": title, "kills": kills, "points": points, "visited": len({*order[:exact]}), **found}


def main() -> None:
    """Print one line of JSON per operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="an empty folder, or a URL below which nothing is")
    parser.add_argument("--list", action="store_true", help="only say which operations there are")
    parser.add_argument("--kills", type=int, help="in all, dealt out evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.list:
        sys.stdout.write("".join(f"{title}\n" for title in OPERATIONS))
        return
    wanted = options.only.split(",") if options.only else list(OPERATIONS)
    remote = "://" in options.root
    chosen = {title: OPERATIONS[title] for title in wanted if not (remote and OPERATIONS[title].local)}
    for index, (title, operation) in enumerate(chosen.items()):
        kills = None
        if options.kills is not None:
            kills = options.kills * (index + 1) // len(chosen) - options.kills * index // len(chosen)
        root = join_url(options.root, title.replace(" ", "-"))
        sys.stdout.write(json.dumps(torment(root, title, operation, kills, options.seed)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

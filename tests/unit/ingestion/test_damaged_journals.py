"""A damaged journal stops nobody: verify names it, repair clears it, and what a killed ingest had done is done again."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.journal import Journal, TaskDone
from datastore.dataset.snapshot import open_dataset
from datastore.document import seal, unseal
from datastore.ingestion import ingest as module
from datastore.ingestion.ingest import ingest
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings

SETTINGS = IngestSettings(workers=1, task_bytes=10_000, shard_bytes=1024)


class Ground:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.src, self.to = root / "src.jsonl", root / "set"
        rows = (msgspec.json.encode({"id": f"d{n % 390}", "text": f"text {n} " * 9}) for n in range(400))
        self.src.write_bytes(b"\n".join(rows))

    def run(self, to: str = "set") -> IngestReport:
        settings = msgspec.structs.replace(SETTINGS, max_reject_ratio=0.5)
        return ingest([str(self.src)], str(self.root / to), settings=settings)

    def stop_before_the_commit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(module, "commit_ingest", stopped)
            with pytest.raises(KeyboardInterrupt):
                self.run()

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.to.glob(pattern))


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def remove(path: Path) -> None:
    path.unlink()


def claim(change: dict[str, object]) -> Callable[[Path], None]:
    """Return what writes a task of other content, with the digest of that."""

    def write(path: Path) -> None:
        done = unseal(TaskDone, path.read_bytes(), where="")
        path.write_bytes(seal(msgspec.structs.replace(done, **change)))

    return write


def every_shard(**change: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        done = unseal(TaskDone, path.read_bytes(), where="")
        shards = tuple(msgspec.structs.replace(shard, **change) for shard in done.shards)
        path.write_bytes(seal(msgspec.structs.replace(done, shards=shards)))

    return write


DAMAGES = [
    *((kind, spoil) for kind in ("shards/*/*.arrow", "ingests/*/ids/*", "ingests/*/done/*") for spoil in (cut, flip)),
    ("shards/*/*.arrow", remove),
    ("ingests/*/ids/*", remove),
    ("ingests/*/plan.json", cut),
    ("ingests/*/done/*", claim({"task_id": "another"})),
    ("ingests/*/done/*", claim({"documents": 2**62})),
    ("ingests/*/done/*", every_shard(documents=2**62, size_bytes=2**62)),
    ("ingests/*/done/*", every_shard(path="../outside.arrow")),
    ("ingests/*/done/*", every_shard(path="datastore.json")),
    ("ingests/*/done/*", every_shard(digest=b"short")),
]


@pytest.mark.parametrize(("pattern", "spoil"), DAMAGES)
def test_what_was_damaged_since_it_was_written_is_done_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, pattern: str, spoil: Callable[[Path], None]
) -> None:
    ground.run("whole")
    ground.stop_before_the_commit(monkeypatch)
    spoil(ground.files(pattern)[0])
    report = ground.run()
    assert report.tasks > 1
    assert report.tasks_resumed == report.tasks - (pattern != "ingests/*/plan.json")
    dataset = open_dataset(ground.to)
    assert verify(dataset, deep=True).ok
    assert dataset.to_arrow().equals(open_dataset(ground.root / "whole").to_arrow())


@pytest.mark.parametrize(("pattern", "spoil"), [each for each in DAMAGES if "/done" in each[0] or "plan" in each[0]])
def test_a_damaged_journal_is_named_stops_no_ingest_and_is_cleared(
    ground: Ground, pattern: str, spoil: Callable[[Path], None]
) -> None:
    ground.run()
    path = ground.files(pattern)[0]
    spoil(path)
    key = path.relative_to(ground.to).as_posix()
    assert [bad.path for bad in verify(open_dataset(ground.to)).bad] == [key]

    assert not ground.run().added
    (ground.root / "more.txt").write_text("more text")
    assert ingest([str(ground.root / "more.txt")], str(ground.to), settings=SETTINGS).added

    assert repair(str(ground.to)).ok
    assert verify(open_dataset(ground.to)).ok
    assert not ground.run().added


def test_a_plan_of_which_a_task_has_no_file_is_damaged(ground: Ground) -> None:
    report = ground.run()
    journal = Journal(open_dataset(ground.to).storage, report.ingest_id)
    plan = journal.find_plan()
    assert plan is not None
    wrong = msgspec.structs.replace(plan, files=())
    (ground.to / journal.folder / "plan.json").write_bytes(seal(wrong))
    assert not ground.run().added
    assert journal.find_plan() == plan

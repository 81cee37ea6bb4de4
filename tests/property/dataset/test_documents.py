"""Documents with a right digest and wrong content: each is refused by name or does no harm, whatever is done with the dataset."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.dataset.diff import diff
from datastore.dataset.durability.health import health
from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.tags import set_tag
from datastore.dataset.operations.clone import clone
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.copy import copy
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.purge.plan import keep_plan, list_certificates
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.operations.vacuum import vacuum
from datastore.dataset.snapshot import open_dataset
from datastore.digest import digest_hex
from datastore.errors import DatastoreError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer

SCHEMA = pa.schema({"text": pa.string(), "n": pa.int64()})


def make_tokens(root: Path) -> None:
    """Everything that a dataset of tokens can have beside its data: journals, a tag, deletions, parity, a purge."""
    src = root / "src"
    src.mkdir()
    for number in range(6):
        (src / f"{number}.txt").write_text(f"text {number} " * 20)
    (root / "tok.json").write_bytes(train_tokenizer([str(src)], settings=TokenizerSettings(vocab_size=300)))
    to = str(root / "set")
    ingest_again(root)
    purge(to, sources=["src/5.txt"])
    (src / "6.txt").write_text("text 6 " * 20)
    ingest_again(root)
    delete(to, sources=["src/1.txt"])
    protect(to)
    dataset = open_dataset(to)
    set_tag(dataset.storage, "here", dataset.commit)
    plan = list_certificates(dataset.storage)[0]
    keep_plan(dataset.storage, plan)


def make_records(root: Path) -> None:
    for text in "ab":
        with record_writer(str(root / "set"), schema=SCHEMA) as out:
            out.write({"text": f"{text}{index}", "n": index} for index in range(50))
    delete(str(root / "set"), where="n = 3")
    evolve(str(root / "set"), add={"more": "int32"}, defaults={"more": 3})
    dataset = open_dataset(root / "set")
    set_tag(dataset.storage, "here", dataset.commit)


def ingest_again(root: Path) -> None:
    ingest_settings = IngestSettings(workers=1, tokenizer=str(root / "tok.json"), task_bytes=10_000)
    if (root / "src").is_dir():
        ingest([str(root / "src")], str(root / "set"), settings=ingest_settings)
    else:
        (root / "more.jsonl").write_text('{"text": "c", "n": 1, "more": 2}\n')
        ingest([str(root / "more.jsonl")], str(root / "set"), settings=IngestSettings(workers=1, take="rows"))


def read(root: Path) -> None:
    dataset = open_dataset(root / "set")
    dataset.to_arrow()
    list(dataset.log.history(dataset.commit))


def with_url(run: Callable[[str], object]) -> Callable[[Path], object]:
    return lambda root: run(str(root / "set"))


ACTIONS: dict[str, Callable[[Path], object]] = {
    "read": read,
    "ingest": ingest_again,
    "open a tag": lambda root: open_dataset(f"{root / 'set'}@here").to_arrow(),
    "verify": lambda root: verify(open_dataset(root / "set"), deep=True),
    "repair": with_url(repair),
    "compact": with_url(compact),
    "purge": with_url(purge),
    "purge with tags": with_url(lambda url: purge(url, drop_tags=True)),
    "vacuum": with_url(lambda url: vacuum(url, dry_run=False, older_than_s=0)),
    "expire": with_url(lambda url: expire(url, older_than_s=3600)),
    "expire all": with_url(lambda url: expire(url, keep_last=1)),
    "copy": lambda root: copy(str(root / "set"), str(root / "copy"), all_versions=True),
    "clone": lambda root: clone(str(root / "set"), str(root / "clone")),
    "health": with_url(health),
    "diff": lambda root: diff(open_dataset(root / "set", version=1), open_dataset(root / "set")),
    "protect": with_url(protect),
    "evolve": with_url(lambda url: evolve(url, add={"again": "string"})),
    "delete": with_url(lambda url: delete(url, where="id = '1'")),
}

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300, -1.5]),
    st.sampled_from(
        ["", "x", "../x", "/etc/passwd", "datastore.json", "_log/_last", "a" * 300, "\x00", "0" * 32, "\udce9"]
    ),
    st.sampled_from([[], {}, [None], {"x": 1}, [[]], ["shards/x"]]),
)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON document, itself left out."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*above, key)
        yield from places(inner, (*above, key))


def changed(draw: Callable[..., Any], document: dict[str, Any]) -> None:
    """Change `document` in one place: a value goes, another comes, one is doubled, or two trade places."""
    path = draw(st.sampled_from([place for place in places(document) if place[0] != "digest"]), label="place")
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    present = holder[path[-1]]
    match draw(st.sampled_from(["odd", "odd", "remove", "double", "near"]), label="change"):
        case "remove":
            del holder[path[-1]]
        case "double" if isinstance(present, list):
            holder[path[-1]] = present * 2
        case "near" if isinstance(present, int) and not isinstance(present, bool):
            holder[path[-1]] = max(0, present + draw(st.sampled_from([-1, 1, 7]), label="by"))
        case "near" if isinstance(present, str) and present:
            holder[path[-1]] = present[:-1] + ("0" if present[-1] != "0" else "1")
        case _:
            holder[path[-1]] = draw(ODD, label="value")


def sealed(document: dict[str, Any]) -> tuple[bytes, str]:
    blank = json.dumps(document | {"digest": ""}, indent=2).encode()
    digest = digest_hex(blank)
    return blank.replace(b'"digest": ""', f'"digest": "{digest}"'.encode(), 1), digest


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, make in (("tokens", make_tokens), ("records", make_records)):
        made[kind] = tmp_path_factory.mktemp(kind)
        make(made[kind])
    return made


@given(st.data())
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
def test_a_document_of_wrong_content_is_refused_or_harmless(
    grounds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ground = grounds[data.draw(st.sampled_from(sorted(grounds)), label="dataset")]
    documents = [path for path in (ground / "set").rglob("*") if path.is_file() and path.read_bytes()[:1] == b"{"]
    documents = [path for path in documents if path.parent.name != "tokenizers"]
    names = sorted(path.relative_to(ground).as_posix() for path in documents)
    kinds = sorted({name.rpartition("/")[0] for name in names})
    kind = data.draw(st.sampled_from(kinds), label="folder")
    name = data.draw(st.sampled_from([each for each in names if each.rpartition("/")[0] == kind]), label="document")
    action = data.draw(st.sampled_from(sorted(ACTIONS)), label="action")
    document = json.loads((ground / name).read_bytes())
    changed(data.draw, document)
    raw, digest = sealed(document)

    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(ground, root, dirs_exist_ok=True)
    (root / "set" / "shards" / "notes.txt").write_text("not ours")
    outside = root / "x"
    outside.write_text("not ours")
    (root / name).write_bytes(raw)
    if "purges" in name:  # Called after its digest, so that nobody can tell it from one that was written so.
        (root / name).rename((root / name).with_name(f"{digest}.json"))
    kept = [
        outside,
        root / "set" / "datastore.json",
        *(root / "set" / "_log").glob("0*"),
        root / "set/shards/notes.txt",
    ]
    try:
        with suppress(DatastoreError):
            ACTIONS[action](root)
        assert all(path.exists() for path in kept)
    finally:
        shutil.rmtree(root)

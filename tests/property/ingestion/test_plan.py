"""Laws of the plan and of duplicates."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from datastore.dataset.journal import SourceFile
from datastore.ingestion.plan import make_plan, work_items
from datastore.ingestion.reading.sources import Listing
from datastore.ingestion.settings import IngestSettings, reading_digest
from datastore.ingestion.sinks.duplicates import repeated


@st.composite
def listings(draw: st.DrawFn) -> Listing:
    kinds = st.sampled_from([("text", ""), ("jsonl", ""), ("jsonl", "gz")])
    drawn = draw(st.lists(st.tuples(st.integers(1, 300_000), kinds), max_size=30))
    files = tuple(
        SourceFile(
            path=f"src/{number:03}",
            size_bytes=size,
            modified=0.0,
            format=form,  # type: ignore[arg-type]
            codec=codec,  # type: ignore[arg-type]
            lone=False,
            fingerprint=f"{number:032x}",
        )
        for number, (size, (form, codec)) in enumerate(drawn)
    )
    return Listing(files=files, skipped={}, shown=("src",), take="text", tokens_key="tokens")


tasks = st.integers(1024, 200_000).map(lambda size: IngestSettings(task_bytes=size))


@given(listings(), tasks)
def test_every_byte_of_every_file_is_in_one_task_in_the_order_of_the_files(
    listing: Listing, settings: IngestSettings
) -> None:
    plan = make_plan(listing, settings=settings, kind="tokens", reading_digest="")
    parts = [part for order in work_items(plan) for part in order.parts]
    assert [part[0] for part in parts] == sorted((part[0] for part in parts), key=lambda file: file.path)
    for file in listing.files:
        ranges = [(start, stop) for other, start, stop in parts if other == file]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == file.size_bytes
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        assert len(ranges) == 1 or (file.format == "jsonl" and not file.codec)


@given(listings(), tasks)
def test_no_task_is_much_larger_than_asked_for_unless_one_file_is(listing: Listing, settings: IngestSettings) -> None:
    plan = make_plan(listing, settings=settings, kind="tokens", reading_digest="")
    for order in work_items(plan):
        stored = sum(stop - start for _, start, stop in order.parts)
        largest = max(stop - start for _, start, stop in order.parts)
        assert stored <= settings.task_bytes + largest
    assert all(order.parts for order in work_items(plan))


@given(listings(), tasks, st.sets(st.integers(0, 29)))
def test_known_files_leave_no_trace_in_the_plan_of_the_others(
    listing: Listing, settings: IngestSettings, known: set[int]
) -> None:
    prints = frozenset(f"{number:032x}" for number in known)
    others = Listing(
        files=tuple(file for file in listing.files if file.fingerprint not in prints),
        skipped={},
        shown=("src",),
        take="text",
        tokens_key="tokens",
    )
    found = make_plan(listing, settings=settings, kind="tokens", reading_digest="", known=prints)
    alone = make_plan(others, settings=settings, kind="tokens", reading_digest="")
    assert (found.tasks, found.files, found.ingest_id) == (alone.tasks, alone.files, alone.ingest_id)
    assert found.known == len(listing.files) - len(others.files)


@given(listings(), tasks)
def test_tasks_have_ids_of_their_own(listing: Listing, settings: IngestSettings) -> None:
    plan = make_plan(listing, settings=settings, kind="tokens", reading_digest="")
    assert len({task.id for task in plan.tasks}) == len(plan.tasks)


@given(st.integers(0, 64), st.floats(0, 1), st.sampled_from(["quarantine", "skip", "fail"]))
def test_who_works_and_what_is_tolerated_changes_no_shard(workers: int, ratio: float, on_error: str) -> None:
    changed = IngestSettings(workers=workers, max_reject_ratio=ratio, on_error=on_error)  # type: ignore[arg-type]
    assert reading_digest(changed, tokenizer_sha256="") == reading_digest(IngestSettings(), tokenizer_sha256="")


def test_what_changes_shards_changes_the_digest() -> None:
    plain = reading_digest(IngestSettings(), tokenizer_sha256="")
    changed = [
        IngestSettings(end_of_text="x"),
        IngestSettings(special_tokens="allow"),
        IngestSettings(text_key="x"),
        IngestSettings(id_key="x"),
        IngestSettings(separator="x"),
        IngestSettings(max_document_bytes=1),
        IngestSettings(max_expansion=1),
        IngestSettings(task_bytes=2048),
        IngestSettings(shard_bytes=2048),
    ]
    digests = {reading_digest(settings, tokenizer_sha256="") for settings in changed}
    assert len(digests | {plain, reading_digest(IngestSettings(), tokenizer_sha256="a")}) == len(changed) + 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_a_row_is_repeated_if_and_only_if_an_earlier_one_is_the_same(rows: list[tuple[int, int]]) -> None:
    ids = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    assert repeated(ids).tolist() == [row in rows[:i] for i, row in enumerate(rows)]

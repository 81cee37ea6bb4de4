import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import CorruptError
from datastore.storage.backends.memory import MemoryStorage
from datastore.training.run.record import ConsumptionRecord, StepEntry, read_segments, record_bytes

ENTRIES = [StepEntry(step=i + 1, cursor=8 * i, samples=8, fingerprint=f"{i:016x}") for i in range(20)]


def keep(record: ConsumptionRecord, storage: MemoryStorage, session: str) -> dict[str, str]:
    """Save as a checkpoint does: the segment first, then the state that names it."""
    segment = record.close_segment(session)
    if segment is not None:
        storage.put(*segment)
    return record.state_dict()


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=8))
def test_the_surviving_record_is_that_of_a_run_without_interruptions(sessions: list[tuple[int, int]]) -> None:
    """Each session saves some steps on, and then loses some more steps, or a segment that no checkpoint names."""
    storage = MemoryStorage("killed")
    for found in list(storage.list()):
        storage.delete(found.key)
    state, step = ConsumptionRecord().state_dict(), 0
    for number, (saved, lost) in enumerate(sessions):
        record = ConsumptionRecord()
        record.load_state_dict(state)
        for entry in ENTRIES[step : step + saved]:
            record.add(entry)
        state = keep(record, storage, f"s{number}")
        step = min(step + saved, len(ENTRIES))
        for entry in ENTRIES[step : step + lost]:
            record.add(entry)
        keep(record, storage, f"s{number}x")
    last = ConsumptionRecord()
    last.load_state_dict(state)
    survivors = [entry for _, entries in read_segments(storage, last.last) for entry in entries]
    assert record_bytes(survivors) == record_bytes(ENTRIES[:step])


def test_a_flipped_bit_in_a_segment_is_found() -> None:
    storage = MemoryStorage("flipped")
    record = ConsumptionRecord()
    record.add(ENTRIES[0])
    keep(record, storage, "s")
    key = record.last.key
    raw = bytearray(storage.get(key))
    raw[-5] ^= 1
    storage.put(key, bytes(raw))
    with pytest.raises(CorruptError, match="digest"):
        read_segments(storage, record.last)


def test_a_step_that_is_missing_is_found() -> None:
    storage = MemoryStorage("gap")
    record = ConsumptionRecord()
    record.add(ENTRIES[0])
    record.add(ENTRIES[2])
    keep(record, storage, "s")
    with pytest.raises(CorruptError, match="do not follow"):
        read_segments(storage, record.last)


def test_a_save_without_new_steps_writes_no_segment() -> None:
    record = ConsumptionRecord()
    assert record.close_segment("s") is None
    assert record.state_dict() == {"key": "", "digest": ""}

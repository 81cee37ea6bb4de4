"""A mixture's promises: each source in its own order, near its share at every position, however a run is cut up."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datastore as ds
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, ResumeError
from datastore.loader.batch import Batch
from datastore.loader.cache.prefetch import NEVER
from datastore.loader.loader import Loader
from datastore.loader.lookup import SampleReader
from datastore.loader.mixture.order import seed_of
from datastore.loader.mixture.request import Mixture, Stage
from datastore.loader.mixture.schedule import PERIOD, phases_of
from datastore.loader.settings import LoaderSettings, Rank
from datastore.loader.trace import plan_step
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere

SEQ_LEN = 7
SMALL = LoaderSettings(lanes=16, window=8, threads=0)
SHARDS = {"code": [[700, 300], [5]], "old": [[90]], "web": [[2_000, 11], [1, 1, 1], [900]]}


@pytest.fixture(scope="module")
def sets() -> dict[str, Dataset]:
    return {
        name: make_dataset(f"memory://mixture-{os.getpid()}-{name}", shards, name=name, block_bytes=1024)
        for name, shards in SHARDS.items()
    }


def loader_of(mixture: Mixture, *, batch: int = 8, rank: Rank = Rank(), seed: int = 3) -> Loader:  # noqa: B008
    return Loader(mixture, seq_len=SEQ_LEN, global_batch=batch, seed=seed, rank=rank, options=SMALL)


def names_of(batch: Batch) -> list[str]:
    assert isinstance(batch.dataset, Mixture)
    return [batch.dataset.names[number] for number in batch.sources[batch.valid].tolist()]


def all_names(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in names_of(batch)]


def drawn(mixture: Mixture, *, steps: int, batch: int = 8) -> dict[str, list[list[int]]]:
    """Return the samples of each source, in the order of their positions."""
    found: dict[str, list[list[int]]] = {name: [] for name in mixture.names}
    loader = loader_of(mixture, batch=batch)
    for _ in range(steps):
        step = next(loader)
        for row in np.argsort(step.positions).tolist():
            if step.positions[row] >= 0:
                found[mixture.names[int(step.sources[row])]].append(step.tokens[row].tolist())
    return found


weights_of_many = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=100)


@settings(max_examples=60)
@given(weights=weights_of_many, period=st.sampled_from([0, 1, 77]), data=st.data())
def test_every_source_is_within_two_samples_of_its_share_at_every_position(
    weights: list[float], period: int, data: st.DataObject
) -> None:
    phases, end = phases_of([(0, weights)], most={}, before=(0,) * len(weights))
    assert end is None
    positions = np.arange(period * PERIOD, (period + 1) * PERIOD)
    runs = {run.source: run for run in phases[0].period(period)}
    assert np.array_equal(np.sort(np.concatenate([run.slots for run in runs.values()])), np.arange(PERIOD))
    source = data.draw(st.integers(0, len(weights) - 1))
    before = phases[0].drawn(int(positions[0]))[source]
    counts = before + np.cumsum(np.isin(np.arange(PERIOD), runs[source].slots if source in runs else []))
    ideal = (positions + 1) * (weights[source] / sum(weights))
    assert np.abs(counts - ideal).max() <= 2
    assert source not in runs or runs[source].first == before


@settings(max_examples=40)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6), data=st.data())
def test_a_source_ends_just_after_its_last_draw(weights: list[float], data: st.DataObject) -> None:
    most = {0: data.draw(st.integers(0, 500)), 1: data.draw(st.integers(0, 500))}
    phases, end = phases_of([(0, weights)], most=most, before=(0,) * len(weights))
    assert (end is None) == (len(weights) > 2)
    total = phases[-1].start + 1_000 if end is None else end
    found = Counter[int]()
    for at, phase in enumerate(phases):
        stop = phases[at + 1].start if at + 1 < len(phases) else total
        for number in range(-(-(stop - phase.start) // PERIOD)):
            for run in phase.period(number):
                found[run.source] += int(np.count_nonzero(run.slots < stop - phase.start - number * PERIOD))
    assert {source: found[source] for source in most} == most
    assert sum(found.values()) == total


def test_each_source_comes_in_the_order_that_it_has_alone(sets: dict[str, Dataset]) -> None:
    mixture = ds.Mixture(sets, {"code": 1, "old": 1, "web": 2})
    for name, rows in drawn(mixture, steps=60).items():
        alone = SampleReader(sets[name], seq_len=SEQ_LEN, seed=seed_of(3, name), options=SMALL)
        assert rows == alone.read(range(len(rows))).tokens.tolist()


def test_lanes_of_a_source_read_on_as_they_do_alone(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets, {"code": 3, "old": 1, "web": 2})
    loader = loader_of(mixture)
    orders = loader._position.orders()
    assert orders is not None
    mixed, positions = orders[0], np.arange(3_000)
    found = mixed.locate(positions)
    lanes, ends = mixed.lane_of(positions), mixed.last_of_lane(positions, found.shards)
    assert (ends >= found.samples).all()
    epoch = np.arange(200)  # Within it no source begins anew but the smallest.
    for at in epoch.tolist():
        same = (found.shards[epoch] == found.shards[at]) & (lanes[epoch] == lanes[at])
        assert (found.samples[epoch][same] <= ends[at]).all()


@pytest.mark.parametrize("cursor", [0, 5, 7_770])
def test_when_a_sample_of_a_mixture_is_read_next_is_known_up_to_two_windows(cursor: int) -> None:
    large, small, unused = (
        make_dataset(f"memory://next-{os.getpid()}-{cursor}-{name}", [[tokens]], name=name, block_bytes=1024)
        for name, tokens in (("a", 40_000), ("b", 20_000), ("c", 1_000))
    )
    loader = loader_of(Mixture({"a": large, "b": small, "c": unused}, {"a": 3, "b": 2, "c": 0}))
    orders = loader._position.orders()
    assert orders is not None
    mixed = orders[0]
    found = mixed.locate(np.arange(cursor, cursor + 20_000))
    samples, first = np.unique(found.samples, return_index=True)
    shards = found.shards[first]
    uses = mixed.next_read(shards, samples, samples, cursor=cursor)
    assert (uses >= cursor).all()
    # A window is 8 samples of each of 16 lanes, and a source gets 2 or 3 of 5 positions.
    near = np.abs(uses - cursor - first) <= 2 * 8 * 16 * 5 / np.where(shards == 0, 3, 2)
    # What lies within a window of the cursor may be taken for read or not.
    assert np.mean(near) > 0.9
    assert (
        mixed.next_read(np.array([2]), np.array([samples[-1] + 9]), np.array([samples[-1] + 9]), cursor=0)[0] == NEVER
    )


def test_ranks_together_have_the_batches_of_one(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets)
    alone = loader_of(mixture, batch=12)
    for world in (2, 5):
        ranks = [loader_of(mixture, batch=12, rank=Rank(rank, world)) for rank in range(world)]
        alone.load_state_dict(ranks[0].state_dict())
        for _ in range(20):
            whole = next(alone)
            parts = [next(rank) for rank in ranks]
            assert sum(part.fingerprint() for part in parts) % 2**64 == whole.fingerprint()
            assert Counter(all_names(parts)) == Counter(names_of(whole))


def test_it_resumes_after_any_step_and_on_any_number_of_ranks(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets, {"code": 3, "web": 1}, epochs={"code": 1.5}, stages=[Stage(300, {"old": 1, "web": 1})])

    def open_at(state: object) -> Loader:
        found = loader_of(mixture, batch=24)
        if state is not None:
            found.load_state_dict(json.loads(json.dumps(state)))
        return found

    check_resumes_everywhere(open_at, steps=30)
    undisturbed = [next(batches).fingerprint() for batches in [loader_of(mixture, batch=24)] for _ in range(30)]
    state, found = loader_of(mixture).state_dict(), []
    for step in range(30):
        world = 1 + step % 8
        ranks = [loader_of(mixture, batch=24, rank=Rank(rank, world)) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        found.append(sum(next(rank).fingerprint() for rank in ranks) % 2**64)
        state = ranks[-1].state_dict()
    assert found == undisturbed


def test_epochs_say_how_often_and_then_it_ends(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets, epochs={"code": 2, "old": 0, "web": 1})
    loader = loader_of(mixture, batch=8)
    counts: Counter[str] = Counter()
    tokens: Counter[tuple[int, ...]] = Counter()
    for batch in loader:
        counts.update(names_of(batch))
        tokens.update(tuple(row) for row in batch.tokens[batch.valid].tolist())
    sizes = {name: SampleReader(sets[name], seq_len=SEQ_LEN).samples_per_epoch for name in sets}
    assert counts == {"code": 2 * sizes["code"], "web": sizes["web"]}
    assert Counter(tokens.values()) == {2: sizes["code"], 1: sizes["web"]}


def test_stages_change_the_weights_where_they_say(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets, {"web": 1}, stages=[Stage(100, {"code": 1}), Stage(201, {"old": 1, "code": 3})])
    batches = [next(loader) for loader in [loader_of(mixture, batch=10)] for _ in range(30)]
    positions = {
        int(position): mixture.names[source]
        for batch in batches
        for position, source in zip(batch.positions.tolist(), batch.sources.tolist(), strict=True)
    }
    assert {positions[at] for at in range(100)} == {"web"}
    assert {positions[at] for at in range(100, 201)} == {"code"}
    assert Counter(positions[at] for at in range(201, 281)) == {"old": 20, "code": 60}


def test_temperature_flattens(sets: dict[str, Dataset]) -> None:
    flat = Mixture(sets, {"code": 16, "web": 1}, temperature=2)
    rows = drawn(flat, steps=25)
    assert (len(rows["code"]), len(rows["web"])) == (160, 40)


def test_weights_changed_in_mid_run_hold_from_there_on_and_none_begins_anew(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets, {"code": 1, "web": 1})
    loader = loader_of(mixture, batch=10)
    before = [next(loader) for _ in range(7)]
    with pytest.raises(ConfigError, match="no such source"):
        loader.reweigh({"weeb": 1})
    loader.reweigh({"code": 1, "old": 4})
    state = json.loads(json.dumps(loader.state_dict()))
    after = [next(loader) for _ in range(7)]
    assert Counter(all_names(before)) == {"code": 35, "web": 35}
    assert Counter(all_names(after)) == {"code": 14, "old": 56}
    again = loader_of(mixture, batch=10)  # The same program, killed and begun again.
    again.load_state_dict(state)
    assert [next(again).fingerprint() for _ in range(7)] == [batch.fingerprint() for batch in after]
    alone = SampleReader(sets["code"], seq_len=SEQ_LEN, seed=seed_of(3, "code"), options=SMALL)
    code = [
        row
        for batch in before + after
        for at in np.argsort(batch.positions).tolist()
        if mixture.names[int(batch.sources[at])] == "code"
        for row in [batch.tokens[at].tolist()]
    ]
    assert code == alone.read(range(49)).tokens.tolist()


def test_a_resume_with_other_weights_is_refused_or_chosen(sets: dict[str, Dataset]) -> None:
    first = loader_of(Mixture(sets, {"code": 1, "web": 1}, epochs={"code": 1}), batch=10)
    for _ in range(20):
        next(first)
    state = first.state_dict()
    fewer = {name: sets[name] for name in ("code", "old")}
    other = loader_of(Mixture(fewer, {"code": 2, "old": 1}, epochs={"code": 1}), batch=10)
    with pytest.raises(ResumeError, match=r"sources.web differ"):
        other.load_state_dict(state)
    same = loader_of(Mixture(sets, {"code": 2, "web": 1}, epochs={"code": 1}), batch=10)
    with pytest.raises(ResumeError, match="other weights"):
        same.load_state_dict(state)
    other.load_state_dict(state, reweigh=True)
    assert other.cursor == 200
    left = SampleReader(sets["code"], seq_len=SEQ_LEN).samples_per_epoch - 100
    found = Counter(all_names([next(other) for _ in range(20)]))
    assert found["code"] == left, "what was drawn before the change counts"
    alone = Loader(sets["web"], seq_len=SEQ_LEN, global_batch=8, options=SMALL)
    with pytest.raises(ConfigError, match="nothing to reweigh"):
        alone.load_state_dict(alone.state_dict(), reweigh=True)


def test_the_order_of_names_does_not_matter_and_a_version_of_the_same_set_is_a_source(sets: dict[str, Dataset]) -> None:
    there = Mixture(sets, {"web": 1, "code": 2})
    back = Mixture(dict(reversed(sets.items())), {"code": 2, "web": 1})
    assert next(loader_of(there)).fingerprint() == next(loader_of(back)).fingerprint()
    twice = drawn(Mixture({"now": sets["web"], "then": sets["web"]}, {"now": 1, "then": 1}), steps=30)
    assert twice["now"] != twice["then"]
    assert len(twice["now"]) == 120


def test_a_step_is_traced_to_the_documents_of_its_sources(sets: dict[str, Dataset]) -> None:
    mixture = Mixture(sets)
    loader = loader_of(mixture)
    next(loader)
    state = loader.state_dict()
    batch = next(loader)
    assert np.array_equal(np.sort(plan_step(mixture, state, global_batch=8).samples), np.sort(batch.samples))
    for row, source in enumerate(batch.sources.tolist()):
        dataset = sets[mixture.names[source]]
        spans = [span for span in batch.documents() if span.sample_tokens[0] == 0]
        shard, (start, stop) = spans[row].shard, spans[row].shard_tokens
        assert dataset.token_shard(shard)[0][start:stop].tolist() == batch.tokens[row, : stop - start].tolist()


def with_mask(url: str, *, tokens: int) -> Dataset:
    with ds.token_writer(url, vocab_size=60_000, columns={"loss_mask": "uint8"}) as out:
        out.write(np.arange(tokens), id="chat", loss_mask=np.arange(tokens) % 2)
    return ds.open(url)


def test_a_source_without_a_loss_mask_is_learned_whole(sets: dict[str, Dataset]) -> None:
    chat = with_mask(f"memory://mixture-{os.getpid()}-chat", tokens=900)
    loader = loader_of(Mixture({"chat": chat, "web": sets["web"]}, {"chat": 1, "web": 1}))
    for _ in range(20):
        batch = next(loader)
        assert batch.loss_mask is not None
        for row, source in enumerate(batch.sources.tolist()):
            is_chat = source == 0
            assert batch.loss_mask[row].tolist() == [
                not is_chat or token % 2 == 1 for token in batch.tokens[row].tolist()
            ]


@pytest.mark.parametrize("deletions", ["mask", "compact"])
def test_deleted_documents_of_a_source_are_masked_or_left_out(deletions: str) -> None:
    made = {name: f"memory://mixture-{os.getpid()}-{deletions}-{name}" for name in ("a", "b")}
    lengths = [[30, 50, 20, 61, 40]]
    plain = {name: make_dataset(url, lengths, name=name + deletions, block_bytes=1024) for name, url in made.items()}
    left = {name: np.delete(dataset.token_shard(0)[0], range(30, 80)).tolist() for name, dataset in plain.items()}
    for name, url in made.items():
        ds.delete(url, ids=[plain[name].documents(0)["id"][1].as_py()])
    options = LoaderSettings(lanes=4, window=8, threads=0, deletions=deletions, end_of_text=0)  # type: ignore[arg-type]
    mixture = Mixture({name: ds.open(url) for name, url in made.items()}, epochs={"a": 2, "b": 2})
    seen: list[list[int]] = []
    for batch in Loader(mixture, seq_len=SEQ_LEN, global_batch=8, options=options):
        mask = np.ones_like(batch.tokens, np.bool_) if batch.loss_mask is None else batch.loss_mask
        for row in np.flatnonzero(batch.valid).tolist():
            name = mixture.names[int(batch.sources[row])]
            assert set(batch.tokens[row][mask[row]].tolist()) <= set(left[name])
            seen.append(batch.tokens[row][mask[row]].tolist())
    line = 201 if deletions == "mask" else 151
    assert len(seen) == 4 * ((line - 1) // SEQ_LEN)
    assert any(not row for row in seen) == (deletions == "mask")


def test_wide_and_narrow_tokens_and_files_and_memory_mix(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mix")
    wide = make_dataset(str(folder / "wide"), [[400], [33]], dtype="uint32", name="wide", block_bytes=1024)
    narrow = make_dataset(f"memory://mixture-{os.getpid()}-narrow", [[300]], name="narrow", block_bytes=1024)
    mixture = Mixture({"narrow": narrow, "wide": wide})
    loader = loader_of(mixture)
    tokens = {name: mixture.sources[name].segments for name in mixture.names}
    assert loader.dtype == np.uint32
    assert len(tokens["wide"]) == 2
    whole = {
        name: np.concatenate([s.token_shard(at)[0] for at in range(len(s.segments))]).tolist()
        for name, s in mixture.sources.items()
    }
    for _ in range(30):
        batch = next(loader)
        for row, source in enumerate(batch.sources.tolist()):
            name, line = mixture.names[source], batch.tokens[row].tolist()
            at = int(batch.samples[row]) * SEQ_LEN - (0 if name == "narrow" else -(-300 // SEQ_LEN) * SEQ_LEN)
            assert line == whole[name][at : at + SEQ_LEN + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"web": -1}}, "weight out of range"),
        ({"weights": {"web": 0}}, "all weights are 0"),
        ({"weights": {"nope": 1}}, "no such source"),
        ({"weights": {"web": float("nan")}}, "weight out of range"),
        ({"temperature": 0}, "temperature out of range"),
        ({"epochs": {"web": -1}}, "epochs out of range"),
        ({"stages": [Stage(10, {"web": 1}), Stage(10, {"web": 1})]}, "stages are out of order"),
    ],
)
def test_bad_requests_are_refused(sets: dict[str, Dataset], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(sets, **changes)  # type: ignore[arg-type]


def test_what_cannot_be_is_said_when_it_is_made(sets: dict[str, Dataset]) -> None:
    with pytest.raises(ConfigError, match="no source"):
        Mixture({})
    with pytest.raises(ConfigError, match="not a name"):
        Mixture({"a/b": sets["web"]})
    with pytest.raises(ConfigError, match="says itself how often"):
        Loader(Mixture(sets), seq_len=SEQ_LEN, global_batch=8, options=LoaderSettings(epochs=1))
    with pytest.raises(ConfigError, match=r"longer than the whole dataset.*old"):
        Loader(Mixture(sets), seq_len=100, global_batch=8)
    with pytest.raises(ConfigError, match="too small"):
        loader_of(Mixture(sets, {"web": 1, "code": 1e-12}))

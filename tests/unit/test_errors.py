"""Errors say a fact, its values and the way out, also after they crossed a process border."""

import pickle
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import errors
from datastore.errors import ConfigError, DatastoreError, MissingError, StorageError, WaitError

KINDS = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]
NAMES = st.from_regex(r"[a-z][a-z_]{0,10}", fullmatch=True).filter(lambda name: name not in {"fact", "hint", "self"})
VALUES = st.dictionaries(NAMES, st.integers() | st.text() | st.none() | st.booleans(), max_size=4)


def test_a_message_is_fact_values_and_way_out() -> None:
    error = ConfigError("the cache is too small", budget="1 GiB", shards=3, hint="Raise cache.budget_bytes.")
    assert str(error) == "the cache is too small (budget='1 GiB', shards=3). Raise cache.budget_bytes."


def test_a_message_without_values_or_hint_is_one_sentence() -> None:
    assert str(ConfigError("the URL is empty")) == "the URL is empty."
    assert str(ConfigError("the URL is empty", hint="Name one.")) == "the URL is empty. Name one."


@given(st.sampled_from(KINDS), st.text(), st.text(), VALUES)
def test_an_error_is_the_same_in_another_process(
    kind: type[DatastoreError], fact: str, hint: str, values: dict[str, object]
) -> None:
    error = kind(fact, hint=hint, **values)
    copy = pickle.loads(pickle.dumps(error))  # what multiprocessing does with it
    assert (type(copy), str(copy), copy.hint, copy.values) == (kind, str(error), hint, values)


def test_every_kind_has_its_own_code() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)


def test_every_kind_is_caught_as_what_the_package_raises() -> None:
    assert all(issubclass(kind, DatastoreError) for kind in KINDS)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigError, ValueError),
        (MissingError, FileNotFoundError),
        (StorageError, OSError),
        (WaitError, TimeoutError),
        (errors.DependencyError, ImportError),
    ],
)
def test_a_kind_is_also_the_builtin_that_fits(kind: type[DatastoreError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="fact"):
        raise kind("fact")


def test_a_storage_error_is_final_unless_it_says_otherwise() -> None:
    assert not StorageError("disk full").transient
    assert StorageError("slow down", transient=True).transient


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_a_process_border_as_json(kind: type[DatastoreError]) -> None:
    values = {"path": Path("a/b"), "sizes": (1, 2**70), "by": {3: {"x"}}, "text": "a\ud800", "none": None, "half": 0.5}
    error = kind("fact", hint="Hint.", transient=True, **values)
    found = errors.error_from_dict(orjson.loads(orjson.dumps(error.as_dict())))
    assert type(found) is kind
    assert (found.fact, found.hint) == ("fact", "Hint.")
    shown = {"path": "a/b", "sizes": [1, str(2**70)], "by": {"3": ["x"]}, "text": "a\\ud800", "none": None, "half": 0.5}
    assert found.values == {"transient": True, **shown}


def test_an_error_of_a_later_package_is_still_an_error_of_ours() -> None:
    found = errors.error_from_dict({"code": "unheard of", "fact": "fact", "hint": "", "values": {}})
    assert type(found) is DatastoreError

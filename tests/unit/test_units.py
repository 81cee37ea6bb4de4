"""Sizes, counts and durations as text and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConfigError
from datastore.units import format_bytes, format_count, format_seconds, parse_bytes

UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


@given(st.integers(0, 999), st.sampled_from(sorted(UNITS)))
def test_a_size_written_with_a_unit_is_read_back(count: int, unit: str) -> None:
    assert parse_bytes(f"{count} {unit}") == parse_bytes(f" {count}{unit} ") == count << UNITS[unit]


BORDERS = st.builds(
    lambda size, factor: size * factor,
    st.sampled_from(
        [1, 60, 3600, *(1000 * 10**power for power in (0, 3, 6, 9)), *(1000 << shift for shift in UNITS.values())]
    ),
    st.floats(0.99, 1.01),
)
"""Numbers around those at which a text changes its unit."""


@given(st.integers(0, 2**50) | BORDERS.map(round))
def test_a_formatted_size_is_the_size_to_three_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize("text", ["", "12", "64MB", "64 mib", "-1 MiB", "1e3 B", "MiB", "1 MiB 2", "nan B"])
def test_a_size_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size in bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1610612736, "1.5 GiB"), (1023 * 2**20, "1023 MiB")],
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (12_345_678, "12.3 M"), (0.25, "0.25"), (2.5e12, "2.5 T")],
)
def test_counts_read_well(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0123, "12 ms"), (1, "1.0 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(BORDERS)
def test_a_duration_never_shows_a_full_larger_unit(seconds: float) -> None:
    text = format_seconds(seconds)
    assert not any(full in text for full in ("1000 ms", "60.0 s", " 60 s", "60 min"))


@given(BORDERS)
def test_no_number_is_written_with_an_exponent(number: float) -> None:
    assert "e" not in format_count(number) + format_bytes(number).removesuffix("iB")

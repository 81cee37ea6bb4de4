import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.training.optim import learning_rate
from datastore.training.settings import OptimSettings


@given(st.integers(0, 50), st.integers(1, 300))
def test_the_rate_rises_to_its_peak_and_then_falls_to_its_floor(warmup: int, steps: int) -> None:
    settings = OptimSettings(lr=2.0, warmup=warmup, floor=0.25)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 2.0 for rate in rates)
    if steps > warmup + 1:
        assert max(rates) == rates[warmup] == 2.0
        assert rates[-1] == pytest.approx(0.5)

"""The scale of a loss in float16: halved by a step that overflows, doubled after many that do not."""

import torch

from datastore.training.optim import LossScale


def test_a_step_that_overflows_is_not_taken_and_halves_the_scale() -> None:
    scale = LossScale()
    before = scale.factor.item()
    assert not scale.update(finite=False)
    assert scale.factor.item() == before / 2
    assert scale.update(finite=True)


def test_two_thousand_good_steps_in_a_row_double_it() -> None:
    scale = LossScale()
    before = scale.factor.item()
    for _ in range(1999):
        scale.update(finite=True)
    scale.update(finite=False)
    for _ in range(2000):
        assert scale.factor.item() == before / 2
        scale.update(finite=True)
    assert scale.factor.item() == before


def test_gradients_that_no_scale_makes_finite_are_not_skipped_for_ever() -> None:
    scale = LossScale()
    skipped = 0
    while not scale.update(finite=False):
        skipped += 1
    assert skipped == 16


def test_its_state_is_filled_in_place() -> None:
    scale, other = LossScale(), LossScale()
    scale.update(finite=False)
    for name, tensor in other.state().items():
        tensor.copy_(scale.state()[name])
    assert torch.equal(other.factor, scale.factor)

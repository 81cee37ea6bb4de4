from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from datastore.errors import ConfigError, ResumeError
from datastore.training.hooks.base import RunState
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.distill import Distill, DistillSettings, divergence, divergence_of_likeliest
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import HostRows, MicroBatch, Objective
from datastore.training.objectives.language import Causal, Masked, MaskedSettings
from datastore.training.settings import ModelSettings

CPU = torch.device("cpu")
IDS = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).integers(0, 24, size=(3, 9)))


def logits(seed: int) -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed)) * 3


@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_divergence_is_that_of_torch_and_nothing_for_equals(seed: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    wanted = functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(divergence(student, teacher, temperature=temperature), wanted * temperature**2)
    assert divergence(teacher, teacher, temperature=temperature).abs().max() < 1e-5


@given(st.integers(0, 99), st.integers(1, 24))
def test_of_the_likeliest_tokens_it_is_never_more_and_with_all_of_them_the_same(seed: int, top: int) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    scores, tokens = functional.log_softmax(teacher, -1).topk(top)
    some = divergence_of_likeliest(student, tokens, scores)
    whole = divergence(student, teacher, temperature=1.0)
    assert (some <= whole + 1e-3).all()  # Events that are put together are harder to tell apart.
    if top == 24:
        torch.testing.assert_close(some, whole, atol=1e-3, rtol=1e-3)


def gpt(seed: int, width: int = 16, vocab_size: int = 24) -> GPT:
    model = GPT(ModelSettings(layers=1, width=width, heads=2, vocab_size=vocab_size))
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def started(
    settings: DistillSettings, student: nn.Module, teacher: nn.Module, objective: Objective | None = None
) -> Distill:
    calibration = Calibration(lambda count: HostRows(np.zeros((count, 9), np.int64)), objective or Causal(), CPU)
    optimizer = torch.optim.SGD(student.parameters())
    hook = Distill(settings)
    hook.start(RunState(student, optimizer, 0, 9, 0, 1, CPU, calibration, lambda _name: teacher))
    return hook


def loss_of(hook: Distill, student: GPT, batch: MicroBatch) -> Tensor:
    outputs = student(batch.inputs)
    return hook.loss(Causal().loss(outputs, batch), batch, outputs)


def test_the_loss_is_both_by_alpha_over_the_tokens_that_count() -> None:
    student, teacher = gpt(1), gpt(2)
    hook = started(DistillSettings(teacher="t", alpha=0.25), student, teacher)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 5:] = False
    batch = MicroBatch(IDS, mask)
    each = divergence(student(batch.inputs), teacher(batch.inputs), temperature=1.0)[:, :4]
    wanted = 0.75 * Causal().loss(student(batch.inputs), batch) + 0.25 * each.mean()
    torch.testing.assert_close(loss_of(hook, student, batch), wanted)
    assert hook.metrics() == {"distill_kl": pytest.approx(float(each.mean().detach()))}


def test_the_teacher_is_not_trained_and_has_no_part_in_the_state() -> None:
    student, teacher = gpt(1), gpt(2)
    hook = started(DistillSettings(teacher="t", hidden=1.0), student, teacher)
    loss_of(hook, student, MicroBatch(IDS)).backward()
    assert all(one.grad is None for one in teacher.parameters())
    assert all(one.grad is not None for one in student.parameters())
    assert list(hook.state_dict()) == ["teacher"]
    hook.load_state_dict(hook.state_dict())
    with pytest.raises(ResumeError, match="another one"):
        hook.load_state_dict(started(DistillSettings(teacher="t"), student, gpt(3)).state_dict())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    model = gpt(1)
    hook = started(DistillSettings(teacher="t", alpha=1.0, temperature=2.0, hidden=3.0), model, gpt(1))
    assert float(loss_of(hook, model, MicroBatch(IDS)).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "teacher", "objective", "text"),
    [
        ({"teacher": "t"}, gpt(1, vocab_size=30), None, "another vocabulary"),
        ({"teacher": "t", "hidden": 1.0}, gpt(1, width=8), None, "other widths"),
        ({}, gpt(1), None, "there is no teacher"),
        ({"teacher": "t"}, gpt(1), Masked(MaskedSettings(mask_token=1)), "predicts the next token"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    settings: dict[str, Any], teacher: GPT, objective: Objective | None, text: str
) -> None:
    student = gpt(0)
    with pytest.raises(ConfigError, match=text):
        loss_of(started(DistillSettings(**settings), student, teacher, objective), student, MicroBatch(IDS))


def test_columns_have_no_temperature_and_no_hidden_states() -> None:
    with pytest.raises(ValueError, match="columns"):
        DistillSettings(temperature=2.0)

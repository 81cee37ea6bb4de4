"""Checkpoints on a real S3 server: conditional writes decide, nothing is renamed, what is not needed goes."""

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep
from datastore.errors import ConflictError
from datastore.storage.resolve import open_storage

pytestmark = pytest.mark.s3


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"large": torch.full((3 * 2**20,), value), "small": torch.full((5,), value)}}


def test_steps_are_saved_restored_forgotten_and_passed_over_if_damaged(s3_url: str) -> None:
    with Checkpointer(s3_url, keep=Keep(last=2)) as ck:
        for step in (1, 2, 3):
            ck.save(step, state(float(step)))
    storage = open_storage(s3_url)
    parts = [stat.key for stat in storage.list("parts") if stat.key.endswith(".safetensors")]
    assert [int(key.split("/")[1].split("-")[0]) for key in parts] == [2, 3]
    raw = bytearray(storage.get(parts[-1]))
    raw[5_000_000] ^= 1
    storage.put(parts[-1], raw)
    into = state(0.0)
    with Checkpointer(s3_url) as ck:
        info = ck.restore(into)
        assert (info.step, [bad.step for bad in info.fell_back]) == (2, [3])
        assert into["model"]["large"].eq(2).all()
        ck.save(4, into, blocking=True)
        assert ck.steps() == [2, 4]
        assert ck.verify(4).bad == ()


def test_a_second_writer_is_refused(s3_url: str) -> None:
    with Checkpointer(s3_url) as ck, Checkpointer(s3_url) as other:
        ck.save(1, state(1.0), blocking=True)
        for step in (1, 2):
            with pytest.raises(ConflictError):
                other.save(step, state(2.0), blocking=True)
        assert ck.steps() == [1]

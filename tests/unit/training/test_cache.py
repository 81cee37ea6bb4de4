"""Keys and values that are kept, as they are and as integers."""

import pytest
import torch

from datastore.errors import ConfigError
from datastore.training.models.cache import KeyValueCache, RoundedCache
from datastore.training.models.gpt import GPT
from datastore.training.models.huggingface import Continuation
from datastore.training.settings import ModelSettings

IDS = torch.arange(30).view(2, 15)


def gpt() -> GPT:
    model = GPT(ModelSettings(layers=2, width=128, heads=4, kv_heads=2, vocab_size=40))
    model.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def test_each_head_of_each_token_is_rounded_by_its_own_largest_value() -> None:
    keys = torch.tensor([[[[127.0, -63.5, 0.4]], [[0.0, 0.0, 0.0]]], [[[1e-3, -1e-3, 0.0]], [[2.0, 1.0, -2.0]]]])
    kept, values = RoundedCache().extend(0, keys, -keys)
    expected = torch.tensor(
        [[[[127.0, -64.0, 0.0]], [[0.0, 0.0, 0.0]]], [[[1e-3, -1e-3, 0.0]], [[2.0, 128 / 127, -2.0]]]]
    )
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(values, -expected)


@torch.no_grad()
def test_a_text_read_at_once_and_token_by_token_is_rounded_alike() -> None:
    model, cache = gpt(), RoundedCache()
    parts = [model(IDS[:, :4], cache)] + [model(IDS[:, i : i + 1], cache) for i in range(4, 15)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS, RoundedCache()), atol=1e-4, rtol=1e-4)
    assert cache.length == 15


@torch.no_grad()
def test_integers_take_a_byte_and_a_share_of_a_scale_and_change_little() -> None:
    model, plain, rounded = gpt(), KeyValueCache(), RoundedCache()
    exact, near = model(IDS, plain), model(IDS, rounded)
    values = 2 * 2 * 2 * 15 * 2 * 32  # Layers, keys and values, rows, tokens, heads, width of a head.
    assert (plain.size_bytes, rounded.size_bytes) == (4 * values, values + 4 * values // 32)
    difference = (near - exact).std() / exact.std()
    assert 0 < float(difference) < 0.02


def test_a_model_of_others_refuses_integers() -> None:
    with pytest.raises(ConfigError, match="only our GPT"):
        Continuation(torch.nn.Linear(2, 2), rounded=True)

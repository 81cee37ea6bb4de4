"""Our GPT and Hugging Face's Llama are the same function, through an exported folder, dense or quantized."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from datastore.errors import ConfigError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.training.export.huggingface import HuggingFaceModel, read_folder, shape_of_folder, write_folder
from datastore.training.hooks.quantize import Quantize
from datastore.training.hooks.quantizing.layers import packed_layer, replace_module
from datastore.training.hooks.quantizing.settings import QuantizeSettings, Scheme, chosen_layers
from datastore.training.models.cache import KeyValueCache
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

IDS = torch.randint(0, 501, (2, 40), generator=torch.Generator().manual_seed(1))


def made(*, tied: bool = True, kv_heads: int = 2) -> GPT:
    settings = ModelSettings(layers=2, width=96, heads=6, kv_heads=kv_heads, mlp_width=160, vocab_size=501, tied=tied)
    model = GPT(settings)
    generator = torch.Generator().manual_seed(0)
    model.initialize(generator)
    for parameter in model.parameters():
        parameter.data.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return model.eval()


def opened_by_transformers(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def saved_and_opened(folder: Path, model: GPT) -> torch.Tensor:
    """Return the logits of transformers from the folder of `model`; those of our reader are the same bits as the model's."""
    write_folder(LocalStorage(folder), HuggingFaceModel(model, 64, None, 0))
    assert torch.equal(read_folder(LocalStorage(folder)).model(IDS), model(IDS))
    return opened_by_transformers(folder)(IDS).logits  # type: ignore[no-any-return]


EMBEDDING = ("*", "model.embed_tokens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "quantized",
    [
        None,
        QuantizeSettings(),
        QuantizeSettings(group=32),
        QuantizeSettings(bits=4, group=32),
        QuantizeSettings(bits=3, group=32),
        QuantizeSettings(bits=3),
        QuantizeSettings(bits=4, group=32, symmetric=False),
        QuantizeSettings(bits=3, symmetric=False),
        QuantizeSettings(layers=EMBEDDING),
        QuantizeSettings(bits=4, symmetric=False, layers=EMBEDDING),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_transformers_computes_the_same_from_an_exported_folder(
    tmp_path: Path, *, tied: bool, quantized: QuantizeSettings | None
) -> None:
    model = made(tied=tied)
    if quantized is not None:
        Quantize(quantized).export(model)
    torch.testing.assert_close(model(IDS), saved_and_opened(tmp_path, model), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_layers_with_different_bits_are_opened_each_as_it_is(tmp_path: Path) -> None:
    model = made(tied=False)
    schemes = [Scheme(), Scheme(bits=4, group=32), Scheme(bits=3), Scheme(bits=3, group=32)]
    for number, (name, layer) in enumerate(chosen_layers(model, ["*", "lm_head"]).items()):
        replace_module(model, name, packed_layer(layer, schemes[number % 4]))
    torch.testing.assert_close(model(IDS), saved_and_opened(tmp_path, model), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "quantized", [QuantizeSettings(activations=8), QuantizeSettings(bits=4, group=32, activations=8)]
)
@torch.no_grad()
def test_rounded_inputs_give_transformers_the_same_loss(tmp_path: Path, quantized: QuantizeSettings) -> None:
    """A last bit decides which way an input is rounded, so logits differ a little, and their loss by next to nothing."""
    model = made(tied=True)
    Quantize(quantized).export(model)
    ours, theirs = model(IDS), saved_and_opened(tmp_path, model)
    loss = [functional.cross_entropy(one[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) for one in (ours, theirs)]
    assert float(loss[0]) == pytest.approx(float(loss[1]), abs=1e-3)


@pytest.mark.parametrize("kv_heads", [0, 1, 3])
@torch.no_grad()
def test_feeding_one_token_at_a_time_gives_the_logits_of_the_whole(kv_heads: int) -> None:
    model, cache = made(kv_heads=kv_heads), KeyValueCache()
    parts = [model(IDS[:, :7], cache)] + [model(IDS[:, i : i + 1], cache) for i in range(7, 40)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_token_does_not_see_those_behind_it() -> None:
    changed = IDS.clone()
    changed[:, 20:] = 7
    assert torch.equal(made()(IDS)[:, :20], made()(changed)[:, :20])


def test_a_model_of_another_kind_is_opened_by_transformers_or_refused_by_what_differs(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path)
    write_folder(folder, HuggingFaceModel(made(), 64, None, 0))
    folder.put("config.json", folder.get("config.json").replace(b'"silu"', b'"gelu"'))
    assert read_folder(folder).model.config.hidden_act == "gelu"
    far = MemoryStorage("models-of-another-kind")  # Where transformers finds no folder.
    for each in folder.list():
        far.put(each.key, folder.get(each.key))
    with pytest.raises(ConfigError, match="hidden_act='gelu'"):
        read_folder(far)
    with pytest.raises(ConfigError, match="hidden_act='gelu'"):
        shape_of_folder(folder)

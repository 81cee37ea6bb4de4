"""llama.cpp computes what our model computes, from the file that we write for it, dense or quantized."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.errors import ConfigError
from datastore.storage.backends.local import LocalStorage
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.export.llama_cpp import GGUF_TYPES, write_gguf
from datastore.training.hooks.quantize import Quantize
from datastore.training.hooks.quantizing.settings import QuantizeSettings
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

xllamacpp = pytest.importorskip("xllamacpp")

VOCABULARY = 101
IDS = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(3))


def made(*, tied: bool, width: int = 64) -> GPT:
    shape = ModelSettings(
        layers=2, width=width, heads=4, kv_heads=2, mlp_width=96, vocab_size=VOCABULARY, tied=tied, rope_theta=5000.0
    )
    model, generator = GPT(shape), torch.Generator().manual_seed(0)
    model.initialize(generator)
    for parameter in model.parameters():
        parameter.data.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return model.eval()


def packaged(model: torch.nn.Module) -> HuggingFaceModel:
    return HuggingFaceModel(model, 64, None, 0)


@contextmanager
def serving(file: Path) -> Iterator[Any]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.cpuparams.n_threads = 1
    yield xllamacpp.Server(parameters)


def log_chances(server: Any, prompt: list[int]) -> dict[int, float]:
    """Return the logarithm of the chance of each next token."""
    request = {"prompt": prompt, "n_predict": 1, "n_probs": VOCABULARY, "samplers": [], "cache_prompt": False}
    answers: list[Any] = []
    server.handle_completions(request, lambda answer: bool(answers.append(answer)) or True)
    answer = json.loads(answers[0]) if isinstance(answers[0], str | bytes) else answers[0]
    content = answer["choices"][0]["logprobs"]["content"]
    return {one["id"]: one["logprob"] for one in content[0]["top_logprobs"]}


@torch.no_grad()
def loss_of_both(folder: Path, model: torch.nn.Module, **options: Any) -> tuple[float, float]:
    """Return the mean loss of the tokens behind the first, in llama.cpp and with us."""
    write_gguf(LocalStorage(folder), packaged(model), **options)
    chances = model(IDS.unsqueeze(0)).log_softmax(dim=-1)[0]
    targets = IDS[1:].tolist()
    with serving(folder / "model.gguf") as server:
        theirs = [log_chances(server, IDS[: n + 1].tolist())[target] for n, target in enumerate(targets)]
    ours = [float(chances[n, target]) for n, target in enumerate(targets)]
    return -sum(theirs) / len(theirs), -sum(ours) / len(ours)


@pytest.mark.parametrize(
    ("tied", "quantized"),
    [
        (True, None),
        (False, None),
        (True, QuantizeSettings(group=32)),
        (False, QuantizeSettings()),
        (False, QuantizeSettings(bits=4, group=32)),
        (True, QuantizeSettings(bits=3, group=32)),
        (True, QuantizeSettings(bits=4, group=32, symmetric=False)),
        (True, QuantizeSettings(group=32, layers=("*", "model.embed_tokens"), file="gguf")),
    ],
)
def test_llama_cpp_computes_the_same_loss(*, tied: bool, quantized: QuantizeSettings | None, tmp_path: Path) -> None:
    """It multiplies rounded inputs with quantized weights, eight bits for 32 of them, and that is what the rest is."""
    model = made(tied=tied)
    if quantized is not None:
        Quantize(quantized).export(model)
    theirs, ours = loss_of_both(tmp_path, model)
    assert theirs == pytest.approx(ours, abs=1e-3 if quantized is None else 1e-2)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@torch.no_grad()
def test_the_gguf_package_quantizes_what_is_not_quantized_yet(kind: str, tmp_path: Path) -> None:
    model = made(tied=True)
    theirs, ours = loss_of_both(tmp_path, model, quantize=kind)
    assert theirs == pytest.approx(ours, abs=0.02 if kind == "q8_0" else 0.7)
    assert theirs != pytest.approx(ours, abs=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_integers_in_the_file_are_those_of_the_hook(bits: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = made(tied=True)
    Quantize(QuantizeSettings(bits=bits, group=32)).export(model)
    write_gguf(LocalStorage(tmp_path), packaged(model))
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    layer = model.model.layers[1].mlp.up_proj
    expected = layer.grid.scales.half().float().repeat_interleave(32, dim=1) * layer.whole.float()
    found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("width", "quantized", "fact"),
    [
        (64, QuantizeSettings(bits=4, group=16), "cannot hold such layers.*group=16"),
        (64, QuantizeSettings(symmetric=False), "cannot hold such layers.*symmetric=False"),
        (64, QuantizeSettings(activations=8), "cannot hold such layers.*activations=8"),
        (72, QuantizeSettings(bits=4), "no whole blocks.*columns=72"),
    ],
)
def test_what_no_gguf_file_holds_is_refused_before_training(
    width: int, quantized: QuantizeSettings, fact: str, tmp_path: Path
) -> None:
    import msgspec

    with pytest.raises(ConfigError, match=fact):
        Quantize(msgspec.structs.replace(quantized, file="gguf")).model(made(tied=True, width=width))
    model = made(tied=True, width=width)
    Quantize(quantized).export(model)
    with pytest.raises(ConfigError, match=fact):
        write_gguf(LocalStorage(tmp_path), packaged(model))
    assert not [*tmp_path.iterdir()]

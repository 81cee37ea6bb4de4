"""A trained model leaves as a Hugging Face folder and predicts what it predicted before."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Processors
from torch.nn import functional

from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.loader.settings import Rank
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import export, open_model
from datastore.training.export.huggingface import write_folder
from datastore.training.export.inference import Sampling, evaluate, generate
from datastore.training.run.folder import RunFolder, open_split
from datastore.training.start import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("export")
    make_language(folder / "data")
    hooks = ({"use": "prune", "ratio": 2.0},)
    train(tiny_settings(folder / "data", "train.steps=60", hooks=hooks), str(folder / "run"))
    return str(folder / "run")


@torch.no_grad()
def loss_of_transformers(folder: Path, run: str) -> float:
    """Compute the validation loss without any code of ours, but for the samples."""
    from transformers import AutoModelForCausalLM

    tokens = open_split(RunFolder.open(run).config()).samples(16, seq_len=32, rank=Rank())[0].mine
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens).long()
    logits = model(ids[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_transformers_opens_an_exported_folder_with_the_same_validation_loss(
    run: str, tmp_path: Path, quantize: str | None
) -> None:
    written = export(run, str(tmp_path), quantize=quantize)
    ours = evaluate(str(tmp_path), run=run).loss
    assert loss_of_transformers(tmp_path, run) == pytest.approx(ours, abs=1e-5)
    assert ours == pytest.approx(evaluate(run).loss, abs={None: 1e-6, "int8": 0.01, "int4": 0.2}[quantize])
    assert written.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_tokenizer_of_an_exported_folder(run: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export(run, str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert tokenizer.eos_token == "<end>"


def test_a_quantizing_hook_quantizes_every_export(run: str, tmp_path: Path) -> None:
    folder = RunFolder.open(run)
    settings = folder.config().settings
    hooks = (*settings.hooks, {"use": "quantize", "group": 32})
    other = tiny_settings(settings.data.url, "train.steps=2", hooks=hooks)
    train(other, str(tmp_path / "run"))
    export(str(tmp_path / "run"), str(tmp_path / "hf"))
    assert any(name.endswith("weight_packed") for name in open_model(str(tmp_path / "hf")).model.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
def test_an_exported_tokenizer_adds_no_token_that_training_never_saw(run: str, tmp_path: Path, nested: bool) -> None:  # noqa: FBT001 - a case
    from transformers import AutoTokenizer

    loaded = open_model(run)
    assert loaded.tokenizer is not None
    tokenizer = Tokenizer.from_str(loaded.tokenizer.decode())
    template = TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", 0)])
    tokenizer.post_processor = Processors([ByteLevel(trim_offsets=False), template]) if nested else template
    tokenizer.enable_truncation(1)
    source = dataclasses.replace(loaded, tokenizer=tokenizer.to_str().encode())
    write_folder(open_storage(tmp_path), source)
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w5")["input_ids"] == [3, 5]
    kept = json.loads((tmp_path / "tokenizer.json").read_bytes())["post_processor"]
    assert (kept["processors"][0]["type"] if nested else kept) == ("ByteLevel" if nested else None)


def bits_of(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_bytes())
    return int(config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"])


def test_what_an_export_is_told_comes_in_the_place_of_a_hook_that_quantizes(run: str, tmp_path: Path) -> None:
    url = RunFolder.open(run).config().settings.data.url
    hooks = ({"use": "quantize", "bits": 8},)
    train(tiny_settings(url, "train.steps=2", hooks=hooks), str(tmp_path / "run"))
    export(str(tmp_path / "run"), str(tmp_path / "own"))
    export(str(tmp_path / "run"), str(tmp_path / "told"), quantize="int4")
    train(tiny_settings(url, "train.steps=2"), str(tmp_path / "plain"))
    export(str(tmp_path / "plain"), str(tmp_path / "once"), quantize="int4")
    assert (bits_of(tmp_path / "own"), bits_of(tmp_path / "told")) == (8, 4)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("told", "once")]
    assert files[0] == files[1], "rounded once, not twice"


@pytest.mark.parametrize(
    "hooks", [({"use": "quantize", "group": 12},), ({"use": "quantize"}, {"use": "quantize", "bits": 4})]
)
def test_a_quantization_that_cannot_be_is_refused_before_the_first_step(
    run: str, tmp_path: Path, hooks: tuple[dict[str, Any], ...]
) -> None:
    url = RunFolder.open(run).config().settings.data.url
    with pytest.raises(ConfigError, match=r"layer='model.layers.0.self_attn.q_proj'.*group=12|quantize once"):
        train(tiny_settings(url, "train.steps=2", hooks=hooks), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_hook_exports_with_the_state_that_it_had_at_that_step(run: str, tmp_path: Path) -> None:
    data = RunFolder.open(run).config().settings.data.url
    hooks = ({"use": "training_hooks:Average"},)
    train(tiny_settings(data, "train.steps=3", "checkpoint.every=1", hooks=hooks), str(tmp_path / "averaged"))
    train(tiny_settings(data, "train.steps=3", "checkpoint.every=1"), str(tmp_path / "plain"))
    each = [open_model(str(tmp_path / "plain"), step=step).model.state_dict() for step in (1, 2, 3)]
    for name, mean in open_model(str(tmp_path / "averaged")).model.state_dict().items():
        torch.testing.assert_close(mean, torch.stack([weights[name] for weights in each]).mean(dim=0))


def test_int8_is_a_quarter_of_the_layers_size(run: str, tmp_path: Path) -> None:
    def layers(folder: str, **options: str) -> int:
        export(run, folder, **options)  # type: ignore[arg-type]
        tensors = open_model(folder).model.model.layers.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    dense, small = layers(str(tmp_path / "dense")), layers(str(tmp_path / "int8"), quantize="int8")
    assert small < 0.35 * dense


def test_a_folder_that_holds_something_is_left_alone_unless_told_otherwise(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConflictError, match=r"mine\.txt"):
        export(run, str(tmp_path))
    export(run, str(tmp_path), replace=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_same_seed_generates_the_same_text_from_a_run_and_from_its_export(run: str, tmp_path: Path) -> None:
    export(run, str(tmp_path))
    sampling = Sampling(tokens=12, seed=3)
    text = generate(run, "w3", sampling=sampling)
    assert text == generate(str(tmp_path), "w3", sampling=sampling)
    assert text.startswith("w3 w")
    assert len({generate(run, "w3", sampling=Sampling(tokens=12, seed=seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("prompt", ["w3", " w3  w4 ", "w3 <|endoftext|> w4", "nobody knows this w3", ""])
def test_the_prompt_is_kept_as_it_is(run: str, prompt: str) -> None:
    text = generate(run, prompt, sampling=Sampling(tokens=3))
    assert text.startswith(prompt)
    assert text.removeprefix(prompt).strip()


def test_without_temperature_the_seed_does_not_matter(run: str) -> None:
    texts = {generate(run, "w3", sampling=Sampling(tokens=8, temperature=0, seed=seed)) for seed in range(3)}
    assert len(texts) == 1


def test_with_keys_and_values_of_8_bits_the_likeliest_text_is_the_same(run: str) -> None:
    texts = {generate(run, "w3", sampling=Sampling(tokens=12, temperature=0, cache_bits=bits)) for bits in (0, 8)}
    assert len(texts) == 1


def test_what_is_not_there_is_said(run: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        export(str(tmp_path / "nothing"), str(tmp_path / "hf"))
    with pytest.raises(MissingError):
        export(run, str(tmp_path / "hf"), step=7)
    with pytest.raises(MissingError):
        open_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="unknown quantization"):
        export(run, str(tmp_path / "hf"), quantize="int3")
    assert not (tmp_path / "hf").exists()

"""Every objective learns, goes on exactly where it was, and is proven; any model of `transformers` in the place of ours."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import datastore as ds
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.config import settings_from
from datastore.errors import ConfigError, MissingError, RejectedError, ResumeError
from datastore.ingestion.settings import IngestSettings
from datastore.testing.examples import make_language
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import evaluate
from datastore.training.metrics import read_metrics
from datastore.training.models.huggingface import build, positions_of
from datastore.training.run.audit import trace
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.settings import Settings
from datastore.training.start import resume, train

WORDS = ["good", "bad", "day", "for", "shares", "of", "tin", "gold", "red", "blue", "square"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset for each objective."""
    folder = tmp_path_factory.mktemp("data")
    words = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tok.json"))
    make_language(folder / "tokens")
    random = np.random.default_rng(0)
    with ds.record_writer(
        str(folder / "headlines"), schema={"id": "string", "text": "string", "label": "string"}
    ) as out:
        for number in range(200):
            label = ["good", "bad"][number % 2]
            text = f"{label} day for {'gold' if random.random() < 0.5 else 'tin'} shares"
            out.write({"id": str(number), "text": text, "label": label})
    with ds.record_writer(str(folder / "sessions"), schema={"items": "list<int64>"}) as out:
        for number in range(200):
            out.write({"items": [(number + 3 * at) % 20 for at in range(2 + number % 6)]})
    with ds.record_writer(
        str(folder / "views"), schema={"user": "int64", "item": "string", "price": "double", "clicked": "bool"}
    ) as out:
        for number in range(400):
            user = number % 7
            out.write({"user": user, "item": "ab"[number % 2], "price": 0.5, "clicked": user < 6})
    with ds.record_writer(str(folder / "pictures"), schema={"image": "binary", "text": "string"}) as out:
        for number in range(100):
            raw = io.BytesIO()
            colour = ["red", "blue"][number % 2]
            Image.new("RGB", (20 + number % 5, 20), colour).save(raw, "PNG")
            out.write({"image": raw.getvalue(), "text": f"{colour} square"})
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(100):
            prompt = f"day for {WORDS[number % 8]}"
            file.write(json.dumps({"prompt": prompt, "chosen": "good gold", "rejected": "bad tin"}) + "\n")
    (folder / "chat.jinja").write_text(TEMPLATE)
    settings = IngestSettings(
        tokenizer=str(folder / "tok.json"), chat_template=str(folder / "chat.jinja"), take="pairs"
    )
    ds.ingest([str(folder / "pairs.jsonl")], str(folder / "pairs"), settings=settings)
    return folder


def tables(data: Path) -> dict[str, dict[str, Any]]:
    """What each objective is told, its dataset first."""
    tokenizer = str(data / "tok.json")
    return {
        "masked": {"url": "tokens", "use": "masked", "mask_token": 61, "rate": 0.3},
        "preference": {"url": "pairs", "use": "preference", "beta": 0.5},
        "classes": {"url": "headlines", "use": "classes", "tokenizer": tokenizer, "labels": ["good", "bad"]},
        "next_item": {"url": "sessions", "use": "next_item", "items": 20},
        "clicks": {
            "url": "views",
            "use": "clicks",
            "categories": ["user", "item"],
            "numbers": ["price"],
            "buckets": 64,
        },
        "captions": {"url": "pictures", "use": "captions", "tokenizer": tokenizer, "size": 16, "patch": 8},
    }


def settings_for(data: Path, name: str, *overrides: str) -> Settings:
    table = dict(tables(data)[name])
    url = str(data / table.pop("url"))
    settings = {
        "data": {"url": url, "seq_len": 12, "global_batch": 8, "holdout": 0.1},
        "model": {"layers": 1, "width": 32, "heads": 2},
        "optim": {"lr": 1e-2, "warmup": 2},
        "train": {"steps": 12, "threads": 1, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 4},
        "eval": {"every": 12, "samples": 8},
        "objective": table,
    }
    return settings_from(Settings, settings, overrides=overrides, where="a test")


def losses(run: str) -> dict[int, float]:
    return {int(line["step"]): float(line["loss"]) for line in read_metrics(RunFolder.open(run).storage)}


OBJECTIVES = ["masked", "preference", "classes", "next_item", "clicks", "captions"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_learns_goes_on_exactly_and_is_proven(data: Path, tmp_path: Path, name: str) -> None:
    whole, halved = str(tmp_path / "whole"), str(tmp_path / "halved")
    result = train(settings_for(data, name), whole)
    found = losses(whole)
    assert result.loss is not None
    assert result.validation_loss is not None
    if name != "masked":  # Which takes more steps, see below.
        assert np.mean([found[step] for step in (10, 11, 12)]) < 0.95 * found[1]
    with Checkpointer(RunFolder.open(whole).storage) as checkpointer:
        checkpointer.rewind(8)
    assert resume(whole).resumed_from == 8
    assert losses(whole)[12] == found[12]
    assert prove(whole).holds
    traced = trace(whole, 9, limit=3)
    assert [sample.position for sample in traced.samples] == [64, 65, 66]
    assert name == "masked" or all(sample.row for sample in traced.samples)
    train(settings_for(data, name, "train.micro_batch=3"), halved)
    assert all(abs(losses(halved)[step] - loss) < 1e-4 for step, loss in found.items() if step < 6)


def test_hidden_tokens_are_found_from_those_on_both_sides(data: Path, tmp_path: Path) -> None:
    settings = settings_for(
        data,
        "masked",
        "train.steps=300",
        "data.global_batch=16",
        "eval.every=0",
        "checkpoint.every=0",
        "model.layers=2",
    )
    result = train(settings, str(tmp_path / "run"))
    assert result.loss is not None
    assert result.loss < 2.5  # From ln 61 = 4.1; of the words of both sides, each leaves two.


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", ["parallel.data=3", "parallel.shard=2"])
def test_an_objective_learns_the_same_on_several_ranks(data: Path, tmp_path: Path, name: str, layout: str) -> None:
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    train(settings_for(data, name, "optim.lr=0.001"), alone)
    train(settings_for(data, name, "optim.lr=0.001", layout), together, processes=int(layout[-1]))
    one, other = losses(alone), losses(together)
    assert all(abs(one[step] - other[step]) < 1e-4 for step in one)
    assert prove(together).holds


def test_the_reference_of_a_preference_is_what_the_run_began_with(data: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(settings_for(data, "preference"), run)
    assert losses(run)[1] == pytest.approx(np.log(2), abs=1e-6)  # Model and reference are the same.
    loaded = open_model(run)
    assert loaded.objective is not None
    assert loaded.objective.frozen is not None
    first = open_model(run, step=4)
    assert first.objective is not None
    assert first.objective.frozen is not None
    for name, tensor in loaded.objective.frozen.state_dict().items():
        assert torch.equal(tensor, first.objective.frozen.state_dict()[name])
    assert not torch.equal(
        loaded.model.state_dict()["model.norm.weight"], loaded.objective.frozen.state_dict()["model.norm.weight"]
    )


@pytest.mark.parametrize("name", ["classes", "preference", "masked"])
def test_a_run_is_evaluated_as_it_was_validated(data: Path, tmp_path: Path, name: str) -> None:
    run = str(tmp_path / "run")
    result = train(settings_for(data, name), run)
    assert evaluate(run).loss == pytest.approx(result.validation_loss, rel=1e-5)
    other = evaluate(run, data=settings_for(data, name).data.url)
    assert other.samples == 8
    assert other.loss != evaluate(run).loss
    wrong = {"classes": "tokens"}.get(name, "headlines")
    with pytest.raises(ConfigError, match="another kind"):
        evaluate(run, data=str(data / wrong))


@pytest.mark.parametrize(
    ("name", "overrides", "error", "text"),
    [
        ("masked", ["objective.use=causal", "objective.mask_token=1"], ConfigError, "mask_token"),
        ("classes", ["objective.tokenizer=nowhere.json"], MissingError, "nowhere"),
        ("classes", ['objective.labels=["good"]'], RejectedError, "'bad', which is none of"),
        ("classes", ["data.seq_len=3"], RejectedError, "it has 5 tokens"),
        ("classes", ["objective.pad_token=6"], RejectedError, "ends with objective.pad_token"),
        ("next_item", ["objective.items=10"], RejectedError, "not below"),
        ("next_item", ["objective.column=item"], ConfigError, "item"),
        ("clicks", ['objective.numbers=["user", "item"]'], RejectedError, "could not convert"),
        ("clicks", ["model.use=hf:x.json"], MissingError, "x.json"),
        ("captions", ["objective.size=10"], ConfigError, "multiple of patch"),
    ],
)
def test_what_cannot_be_learned_is_said(
    data: Path, tmp_path: Path, name: str, overrides: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        train(settings_for(data, name, *overrides), str(tmp_path / "run"))


def test_records_are_refused_where_tokens_are_learned_and_the_other_way_round(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns from records"):
        train(settings_for(data, "classes", f"data.url={data / 'tokens'}"), str(tmp_path / "one"))
    with pytest.raises(ConfigError, match="not tokens"):
        train(settings_for(data, "masked", f"data.url={data / 'headlines'}"), str(tmp_path / "other"))


def test_a_run_goes_on_with_the_tokenizer_that_it_began_with_only(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "tok.json"
    own.write_text((data / "tok.json").read_text())
    run = str(tmp_path / "run")
    train(settings_for(data, "classes", f"objective.tokenizer={own}"), run)
    own.write_text(own.read_text().replace('"gold"', '"goal"'))
    with pytest.raises(ResumeError, match="has changed since the run began"):
        resume(run, overrides=["train.steps=16"])


def test_without_a_loss_mask_there_is_no_chat(data: Path, tmp_path: Path) -> None:
    settings = settings_for(data, "masked")
    with pytest.raises(ConfigError, match="no loss mask"):
        train(msgspec.structs.replace(settings, objective={"use": "chat"}), str(tmp_path / "run"))


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )


def llama_of_odd_heads() -> Any:
    config = llama()
    config.num_attention_heads, config.num_key_value_heads = 4, 3
    return config


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)


def qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        tie_word_embeddings=True,
    )


def bert() -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
    )


FOREIGN: list[tuple[Callable[[], Any], str, str]] = [
    (llama, "causal", "AutoModelForCausalLM"),
    (gpt2, "causal", "AutoModelForCausalLM"),
    (qwen3, "causal", "AutoModelForCausalLM"),
    (qwen3, "preference", "AutoModelForCausalLM"),
    (bert, "masked", "AutoModelForMaskedLM"),
    (bert, "classes", "AutoModelForSequenceClassification"),
    (llama, "classes", "AutoModelForSequenceClassification"),
]


def foreign(data: Path, folder: Path, made: Callable[[], Any], name: str, *overrides: str) -> Settings:
    made().save_pretrained(folder)
    causal = name == "causal"
    settings = settings_for(data, "masked" if causal else name, f"model.use=hf:{folder}", *overrides)
    if not causal:
        return settings
    return msgspec.structs.replace(settings, objective={"use": "causal"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("made", "name", "kind"), FOREIGN)
def test_a_model_of_transformers_comes_in_learns_and_goes_out(
    data: Path, tmp_path: Path, made: Callable[[], Any], name: str, kind: str
) -> None:
    import transformers

    run = str(tmp_path / "run")
    result = train(foreign(data, tmp_path / "config", made, name, "optim.lr=0.003"), run)
    found = losses(run)
    assert found[12] < found[1]
    with Checkpointer(RunFolder.open(run).storage) as checkpointer:
        checkpointer.rewind(8)
    (tmp_path / "config" / "config.json").unlink()  # The run has what it needs.
    assert resume(run).loss == result.loss
    assert prove(run).holds
    export(run, to=str(tmp_path / "hf"))
    opened = getattr(transformers, kind).from_pretrained(tmp_path / "hf").eval()
    ours = open_model(run).model.eval()
    ids = torch.randint(2, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, ours(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_id_that_a_config_calls_padding_learns_as_any_other() -> None:
    """OLMo2 names 1 where its config is silent, which is a token of most data: its row stayed zeros."""
    from transformers import Olmo2Config

    architecture = {**llama().to_dict(), "model_type": "olmo2", "pad_token_id": Olmo2Config().pad_token_id}
    model = build(architecture, form="causal", options={}, seed=0)
    table = model.get_input_embeddings().weight
    pad = architecture["pad_token_id"]
    assert pad is not None
    assert table[pad].abs().sum() > 0
    model(torch.full((1, 4), pad)).logits.square().sum().backward()
    assert table.grad[pad].abs().sum() > 0
    told = build(architecture, form="classes", options={"num_labels": 2}, seed=0)
    assert told.get_input_embeddings().weight[pad].abs().sum() == 0


@pytest.mark.filterwarnings("ignore")
def test_the_weights_in_the_folder_are_what_a_run_begins_with(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(llama())
    model.save_pretrained(tmp_path / "base")
    run = str(tmp_path / "run")
    settings = foreign(data, tmp_path / "config", llama, "causal", "optim.lr=1e-12", "train.steps=1")
    named = msgspec.structs.replace(settings.model, use=f"hf:{tmp_path / 'base'}")
    train(msgspec.structs.replace(settings, model=named), run)
    for name, tensor in open_model(run).model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "overrides", "text"),
    [
        (bert, [], "sees the tokens that it is to predict.*is_decoder"),
        (gpt2, ["data.seq_len=33"], "fewer places.*places=32"),
        (llama_of_odd_heads, [], "a pass through this model fails.*num_key_value_heads"),
    ],
)
def test_a_model_of_transformers_that_cannot_predict_the_next_token_is_refused(
    data: Path, tmp_path: Path, made: Callable[[], Any], overrides: list[str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(foreign(data, tmp_path / "config", made, "causal", *overrides), str(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore")
def test_two_of_four_inputs_are_not_taken_where_columns_are_outputs(data: Path, tmp_path: Path) -> None:
    """GPT-2 of transformers stores its layers [in, out]: two of four in a row would be two of four outputs."""
    hook = 'hooks=[{use="prune", ratio=2.0, pattern="2:4", parameters=["*.c_*.weight"]}]'
    with pytest.raises(ConfigError, match=r"columns of these layers are outputs.*h\.0\.attn\.c_attn\.weight"):
        train(foreign(data, tmp_path / "config", gpt2, "causal", hook), str(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore")
def test_places_are_counted_as_models_do() -> None:
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForMaskedLM

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=16))
    assert positions_of(opt) == 16
    opt(torch.ones((1, 16), dtype=torch.int64))
    roberta = RobertaForMaskedLM(RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=16))
    assert positions_of(roberta) == 14  # Its first two are those of padding.
    roberta(torch.zeros((1, 14), dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        roberta(torch.zeros((1, 15), dtype=torch.int64))


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_of_transformers_is_opened_by_it(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, folder = str(tmp_path / "run"), tmp_path / "hf"
    settings = foreign(data, tmp_path / "config", qwen3, "causal", "train.steps=2")
    train(msgspec.structs.replace(settings, hooks=({"use": "quantize", "bits": 8},)), run)
    export(run, to=str(folder))
    assert (
        json.loads((folder / "config.json").read_bytes())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    opened, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = open_model(run).model.eval()(ids)
        torch.testing.assert_close(opened(ids).logits, getattr(expected, "logits", expected), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["parallel.data=2", "parallel.shard=2"])
@pytest.mark.parametrize(("made", "name"), [(llama, "causal"), (qwen3, "causal"), (qwen3, "preference")])
def test_a_model_of_transformers_learns_the_same_on_several_ranks(
    data: Path, tmp_path: Path, layout: str, made: Callable[[], Any], name: str
) -> None:
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    train(foreign(data, tmp_path / "config", made, name, "optim.lr=0.001"), alone)
    train(foreign(data, tmp_path / "config", made, name, "optim.lr=0.001", layout), together, processes=2)
    one, other = losses(alone), losses(together)
    assert all(abs(one[step] - other[step]) < 1e-4 for step in one)


@pytest.mark.filterwarnings("ignore")
def test_our_classifier_is_that_of_transformers(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    run = str(tmp_path / "run")
    train(settings_for(data, "classes"), run)
    export(run, to=str(tmp_path / "hf"))
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[2, 4, 5, 8, 6, 0, 0], [3, 4, 5, 9, 0, 0, 0]])
    with torch.no_grad():
        expected = open_model(run).model.eval()(ids, attention_mask=ids != 0)
        torch.testing.assert_close(opened(ids, attention_mask=ids != 0).logits, expected, rtol=0, atol=1e-5)
    assert opened.config.id2label == {0: "good", 1: "bad"}
    train(settings_for(data, "masked"), str(tmp_path / "masked"))
    with pytest.raises(ConfigError, match="no form in a Hugging Face folder"):
        export(str(tmp_path / "masked"), to=str(tmp_path / "other"))

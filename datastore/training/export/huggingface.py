"""Hugging Face folders: a config file and a plain copy of the tensors, dense or quantized, out and in.

    config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json

`transformers`, vLLM and everything else that reads Llama opens them. config.json is written last: a folder without it is
not a model, so an interrupted export is never mistaken for one.

Source: transformers 5, `models/llama/configuration_llama.py`; https://github.com/huggingface/safetensors#format
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.formats.safetensors import HeaderTensor, encode_header
from datastore.storage.base import Storage
from datastore.training.export.quantized import quantization_config, replace_quantized
from datastore.training.models.gpt import GPT
from datastore.training.models.heads import Classifier
from datastore.training.models.huggingface import open_folder, write_model
from datastore.training.objectives.base import Objective
from datastore.training.settings import ModelSettings

__all__ = ["HuggingFaceModel", "is_foreign", "read_folder", "shape_of_folder", "write_folder"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ADDING = {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}
"""Post-processors of `tokenizers` that add special tokens."""

_ANY_LENGTH = 1 << 20
"""Tokens that a model sees which does not say it: one without positions."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """A model with what belongs to it."""

    model: nn.Module
    seq_len: int
    tokenizer: bytes | None
    """`tokenizer.json`."""

    end_of_text: int | None
    objective: Objective | None = None
    """What it has learned, with what that needs; None: it is from a folder."""

    step: int | None = None
    """The step of a run that it is; None: it is from a folder."""

    passed_over: tuple[str, ...] = ()
    """Newer steps of the run that are damaged, each with its reason."""

    @property
    def shape(self) -> ModelSettings:
        """The shape of a model of ours that has a form in Llama: the GPT, or a classifier on it.

        Raises:
            ConfigError: it is none.
        """
        if isinstance(self.model, Classifier) or (isinstance(self.model, GPT) and self.model.causal):
            return self.model.settings
        raise ConfigError(
            "the model has no form in a Hugging Face folder",
            model=type(self.model).__name__,
            hint='Train a model of transformers, `model.use = "hf:FOLDER"`, or use it from Python: `open_model`.',
        )


def write_folder(storage: Storage, source: HuggingFaceModel) -> dict[str, int]:
    """Write `source` to the root of `storage`; return the size of each file in bytes.

    Raises:
        ConfigError: the model has no form in such a folder.
    """
    if hasattr(source.model, "save_pretrained"):
        return _write_foreign(storage, source)
    _ = source.shape  # Before anything is written.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in source.model.state_dict().items()}
    # Wide dtypes first, so that every tensor is aligned for its own; names then, so that the bytes are a function of the model.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = [HeaderTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    chunks = [encode_header(header, metadata={"format": "pt"})]
    chunks += [tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered]
    storage.put(_WEIGHTS, *chunks)
    sizes = {_WEIGHTS: sum(len(chunk) for chunk in chunks)}
    for key, content in _small_files(source):
        storage.put(key, content)
        sizes[key] = len(content)
    return sizes


def _write_foreign(storage: Storage, source: HuggingFaceModel) -> dict[str, int]:
    """Write a model of `transformers` as that does it, with the tokenizer that it was trained with; config.json comes last."""
    with tempfile.TemporaryDirectory() as folder:
        files = {file.name: file.read_bytes() for file in write_model(source.model, Path(folder))}
    files |= dict(_tokenizer_files(source))
    config = files.pop("config.json")
    quantization = quantization_config(source.model)
    if quantization is not None:
        config = orjson.dumps(orjson.loads(config) | {"quantization_config": quantization}, option=orjson.OPT_INDENT_2)
    for key, content in [*files.items(), ("config.json", config)]:
        storage.put(key, content)
    return {key: len(content) for key, content in {**files, "config.json": config}.items()}


def shape_of_folder(storage: Storage) -> ModelSettings:
    """Return the shape of the model in a folder.

    Raises:
        MissingError: no config.json.
        ConfigError: a model that our GPT is not.
    """
    config = _read_json(storage, "config.json")
    _check_supported(config, where=storage.url)
    return _model_settings(config)


def is_foreign(storage: Storage) -> bool:
    """Return whether there is a model folder whose model our GPT is not: one that `transformers` must open."""
    return _maybe(storage, "config.json") is not None and not _is_plain_llama(_read_json(storage, "config.json"))


def read_folder(storage: Storage) -> HuggingFaceModel:
    """Return the model in a folder, as it is on disk: dense in float32, or quantized; one that is not ours as `transformers` opens it.

    Raises:
        MissingError: no config.json, or a file that it needs is not there.
        ConfigError: a model that `transformers` does not open either, or one that is not on this machine.
        DependencyError: it needs `transformers`.
        CorruptError: a file is damaged.
    """
    config = _read_json(storage, "config.json")
    file = storage.local_path("config.json")
    if file is not None and not _is_plain_llama(config):
        return _read_foreign(storage, file.parent)
    _check_supported(config, where=storage.url)
    model = GPT(_model_settings(config))
    quantization = config.get("quantization_config")
    if quantization:
        replace_quantized(model, quantization, where=storage.url)
    found = dict(_read_tensors(storage))
    wanted = model.state_dict()
    if set(found) != set(wanted):
        differ = sorted(set(found) ^ set(wanted))[:8]
        raise ConfigError("the tensors of the folder are not those of the model", differ=differ, url=storage.url)
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in found.items()})
    end = config.get("eos_token_id")
    return HuggingFaceModel(
        model=model,
        seq_len=int(config["max_position_embeddings"]),
        tokenizer=_maybe(storage, "tokenizer.json"),
        end_of_text=end[0] if isinstance(end, list) else end,
    )


def _is_plain_llama(config: Mapping[str, Any]) -> bool:
    named = config.get("architectures") or ["LlamaForCausalLM"]
    return config.get("model_type") == "llama" and named == ["LlamaForCausalLM"] and not _unlike(config)


def _read_foreign(storage: Storage, folder: Path) -> HuggingFaceModel:
    """Return another model, as `transformers` opens it."""
    model, config = open_folder(folder)
    lengths = (config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    end = config.get("eos_token_id")
    return HuggingFaceModel(
        model=model,
        seq_len=next((int(one) for one in lengths if one), _ANY_LENGTH),
        tokenizer=_maybe(storage, "tokenizer.json"),
        end_of_text=end[0] if isinstance(end, list) else end,
    )


def _small_files(source: HuggingFaceModel) -> Iterator[tuple[str, bytes]]:
    end = source.end_of_text
    yield "generation_config.json", _json({"eos_token_id": end, "bos_token_id": None, "pad_token_id": None})
    yield from _tokenizer_files(source)
    yield "config.json", _json(_config(source))


def _tokenizer_files(source: HuggingFaceModel) -> Iterator[tuple[str, bytes]]:
    end = source.end_of_text
    if source.tokenizer is not None:
        yield "tokenizer.json", _as_trained(source.tokenizer)
        text = Tokenizer.from_str(source.tokenizer.decode()).id_to_token(end) if end is not None else None
        yield (
            "tokenizer_config.json",
            _json(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": source.seq_len,
                    "clean_up_tokenization_spaces": False,
                    "eos_token": text,
                }
            ),
        )


def _as_trained(tokenizer: bytes) -> bytes:
    """Return a `tokenizer.json` that makes of a text what the model was trained on: its tokens, all of them and no others.

    Ingestion adds no special tokens and cuts nothing; `transformers` would begin each prompt with a BOS that the model has
    never seen, as the template says.
    """
    table = orjson.loads(tokenizer)
    table |= {"post_processor": _without_templates(table.get("post_processor")), "truncation": None, "padding": None}
    return orjson.dumps(table)


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what is left of a post-processor that adds no token: what moves the offsets of tokens stays."""
    if processor is None or processor["type"] in _ADDING:
        return None
    if processor["type"] != "Sequence":
        return processor
    parts = [part for one in processor["processors"] if (part := _without_templates(one)) is not None]
    return {**processor, "processors": parts} if parts else None


def _config(source: HuggingFaceModel) -> dict[str, Any]:
    shape = source.shape
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": source.seq_len,
        "rms_norm_eps": shape.norm_eps,
        # Readers before transformers 5 know the first, those since then the second.
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": source.end_of_text,
        "pad_token_id": None,
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    if isinstance(source.model, Classifier) and source.objective is not None:
        labels = dict(enumerate(source.objective.settings.labels))  # type: ignore[attr-defined]
        config |= {
            "architectures": ["LlamaForSequenceClassification"],
            "id2label": {str(number): label for number, label in labels.items()},
            "label2id": {label: number for number, label in labels.items()},
            "pad_token_id": source.objective.settings.pad_token,  # type: ignore[attr-defined]
        }
    quantization = quantization_config(source.model)
    return config if quantization is None else config | {"quantization_config": quantization}


def _model_settings(config: Mapping[str, Any]) -> ModelSettings:
    rope = config.get("rope_parameters") or {}
    width, heads, given = config["hidden_size"], config["num_attention_heads"], config.get("head_dim") or 0
    return ModelSettings(
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        head_width=0 if given * heads == width else given,
        kv_heads=config.get("num_key_value_heads") or 0,
        mlp_width=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config["rms_norm_eps"],
    )


def _check_supported(config: Mapping[str, Any], *, where: str) -> None:
    wrong = _unlike(config)
    if wrong:
        hint = 'Only plain Llama models are read; one of another kind is trained as it is: model.use = "hf:FOLDER".'
        raise ConfigError("not a model that this GPT is", url=where, **wrong, hint=hint)


def _unlike(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config has that is not so in a plain Llama."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wanted = {
        "model_type": (config.get("model_type"), "llama"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    return {key: found for key, (found, needed) in wanted.items() if found != needed}


def _read_tensors(storage: Storage) -> Iterator[tuple[str, Tensor]]:
    index = _maybe(storage, _INDEX)
    files = sorted(set(orjson.loads(index)["weight_map"].values())) if index else [_WEIGHTS]
    for file in files:
        raw = memoryview(bytearray(storage.get(file)))
        where = f"{storage.url}/{file}"
        try:
            start = 8 + int.from_bytes(raw[:8], "little")
            header = orjson.loads(raw[8:start])
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, stop = (start + offset for offset in entry["data_offsets"])
                yield name, torch.frombuffer(raw[first:stop], dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CorruptError(f"not a safetensors file: {error}", where=where) from None


def _read_json(storage: Storage, key: str) -> dict[str, Any]:
    try:
        value = orjson.loads(storage.get(key))
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"not JSON: {error}", where=f"{storage.url}/{key}") from None
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", where=f"{storage.url}/{key}")
    return value


def _maybe(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key)
    except MissingError:
        return None


def _json(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"

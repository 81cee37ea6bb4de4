"""GGUF: the one file that llama.cpp opens, with the shape of the model and its tensors, quantized or not.

    model.gguf

The rows of queries and keys are in another order there: the two channels that turn together lie side by side. What the `quantize` hook has
found is stored as it is, an integer for an integer, in Q8_0, Q4_0, or with zero points Q4_1; only its scales are rounded to 16 bits.
Other matrices are stored in F16, or as the `gguf` package quantizes them; norms in F32. A tied output layer is not stored: llama.cpp uses
the embedding. Of the tokenizer there are the texts of the tokens and the merges; how llama.cpp cuts a text before them is not known to be
the same, so compare what it makes of a text, or give it numbers of tokens.

Source: gguf 0.19; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; ggml-common.h (`block_q4_0`, `block_q4_1`, `block_q8_0`).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from datastore.errors import ConfigError, DependencyError
from datastore.storage.base import Storage
from datastore.training.export.huggingface import HuggingFaceModel
from datastore.training.hooks.quantizing.holding import GGUF_BLOCK, refuse_for_gguf
from datastore.training.hooks.quantizing.layers import Packed
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

__all__ = ["GGUF_TYPES", "write_gguf"]

GGUF_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""To which the gguf package quantizes linear layers, if it is told to."""

_FILE = "model.gguf"
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Bytes = npt.NDArray[np.uint8]


def write_gguf(storage: Storage, source: HuggingFaceModel, *, quantize: str | None = None) -> dict[str, int]:
    """Write `source` as `model.gguf`; `quantize` names the type of linear layers that are not quantized yet. Return the size.

    Raises:
        ConfigError: llama.cpp has no such model, or no such tensors.
        DependencyError: gguf is not installed.
    """
    gguf = _library()
    model = source.model
    if not isinstance(model, GPT) or not model.causal:
        raise ConfigError("llama.cpp has no such model", model=type(model).__name__, hint="Export a causal GPT.")
    packed = {name: one for name, one in model.named_modules() if isinstance(one, Packed)}
    refuse_for_gguf(packed, {one.scheme for one in packed.values()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE
        writer = gguf.GGUFWriter(path, "llama")
        _add_shape(writer, model.settings, seq_len=source.seq_len)
        _add_vocabulary(gguf, writer, source, size=model.settings.vocab_size)
        for name, module in model.named_modules():
            if isinstance(module, Packed | nn.Linear | nn.Embedding | nn.RMSNorm):
                for key, data, kind in _tensors(gguf, name, module, model.settings, quantize):
                    writer.add_tensor(key, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = path.read_bytes()
    storage.put(_FILE, content)
    return {_FILE: len(content)}


def _library() -> Any:
    try:
        import gguf  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise DependencyError(
            "GGUF files need an extra", missing=error.name, hint="Install it: pip install 'llm-datastore[compress]'."
        ) from None
    return gguf


def _add_shape(writer: Any, shape: ModelSettings, *, seq_len: int) -> None:
    writer.add_context_length(seq_len)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)


def _add_vocabulary(gguf: Any, writer: Any, source: HuggingFaceModel, *, size: int) -> None:
    """Name each token, and the merges if they are of pairs of bytes; a token that has no name gets one."""
    names, merges, special = _vocabulary(source.tokenizer)
    if source.end_of_text is not None:
        special.add(source.end_of_text)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([names.get(number, f"<unused {number}>") for number in range(size)])
    writer.add_token_types(
        [
            kinds.CONTROL if number in special else kinds.NORMAL if number in names else kinds.UNUSED
            for number in range(size)
        ]
    )
    writer.add_token_merges(merges or ["a b"])  # An empty list is no list to llama.cpp.
    writer.add_add_bos_token(value=False)
    if source.end_of_text is not None:
        writer.add_eos_token_id(source.end_of_text)


def _vocabulary(tokenizer: bytes | None) -> tuple[dict[int, str], list[str], set[int]]:
    """Return the text of each token, the merges, and which tokens are special."""
    if tokenizer is None:
        return {}, [], set()
    names = {number: text for text, number in Tokenizer.from_str(tokenizer.decode()).get_vocab().items()}
    table = orjson.loads(tokenizer)
    special = {one["id"] for one in table.get("added_tokens") or () if one["special"]}
    merges = (table.get("model") or {}).get("merges") or []
    return names, [one if isinstance(one, str) else " ".join(one) for one in merges], special


def _tensors(
    gguf: Any, name: str, module: nn.Module, shape: ModelSettings, quantize: str | None
) -> Iterator[tuple[str, npt.NDArray[Any], Any]]:
    """Yield the name of a module's weight in the file, its bytes, and their type."""
    key = f"{_name_of(name)}.weight"
    heads = {"q_proj": shape.heads, "k_proj": shape.key_heads}.get(name.rpartition(".")[2], 0)
    kinds = gguf.GGMLQuantizationType
    if isinstance(module, Packed):
        data, kind = _blocks(module, heads)
        yield key, data, kinds[kind]
        return
    weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
    array = _turned(weight, heads).contiguous().numpy()
    if weight.dim() < 2:
        yield key, array, kinds.F32
    elif quantize is not None and isinstance(module, nn.Linear) and name != "lm_head":
        if array.shape[1] % GGUF_BLOCK:
            raise ConfigError(
                "the columns of a layer are no whole blocks of a GGUF file", layer=name, columns=array.shape[1],
                block=GGUF_BLOCK, hint="Leave out `quantize`.",
            )  # fmt: skip
        yield key, gguf.quants.quantize(array, kinds[quantize.upper()]), kinds[quantize.upper()]
    else:
        if float(np.abs(array).max(initial=0.0)) > float(np.finfo(np.float16).max):
            raise ConfigError("a weight is too large for 16 bits", layer=name, hint="Export another format.")
        yield key, array.astype(np.float16), kinds.F16


def _name_of(name: str) -> str:
    """Return how GGUF calls a module."""
    if name in _OUTER:
        return _OUTER[name]
    layer, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_INNER[inner]}"


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of queries or keys in llama.cpp's order; with 0 heads they stay."""
    if not heads:
        return rows
    return rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _blocks(layer: Packed, heads: int) -> tuple[Bytes, str]:
    """Return the integers of a layer in blocks [out, bytes], and the type of those."""
    grid = layer.grid
    whole = _turned(layer.whole, heads)
    each = whole.shape[1] // GGUF_BLOCK // grid.scales.shape[1]
    scales = _turned(grid.scales, heads).repeat_interleave(each, dim=1)
    values = whole.view(len(whole), -1, GGUF_BLOCK)
    head = [_halves(scales)]
    if layer.scheme.bits == 8:
        return _joined([*head, values.contiguous().numpy().view(np.uint8)]), "Q8_0"
    if grid.zeros is not None:
        zeros = _turned(grid.zeros, heads).repeat_interleave(each, dim=1)
        head.append(_halves(-(zeros + 8) * scales))
    unsigned = (values + 8).to(torch.uint8)
    nibbles = unsigned[..., : GGUF_BLOCK // 2] | (unsigned[..., GGUF_BLOCK // 2 :] << 4)
    return _joined([*head, nibbles.contiguous().numpy()]), "Q4_0" if grid.zeros is None else "Q4_1"


def _halves(values: Tensor) -> Bytes:
    """Return the bytes [out, blocks, 2] of 16-bit numbers.

    Raises:
        ConfigError: one of them is too large or too small.
    """
    halves = values.to(torch.float16)
    if not bool(halves.isfinite().all()) or bool(((halves == 0) & (values != 0)).any()):
        raise ConfigError(
            "a scale does not fit into 16 bits",
            smallest=float(values.abs().min()),
            largest=float(values.abs().max()),
            hint="Export a Hugging Face folder, whose scales have 32 bits.",
        )
    return halves.contiguous().numpy().view(np.uint8).reshape(*values.shape, 2)


def _joined(parts: list[Bytes]) -> Bytes:
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(len(joined), -1)

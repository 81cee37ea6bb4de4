"""A run for other programs: a GGUF file for llama.cpp, and a folder of peft with the adapters alone.

    model.gguf                                          the whole model, merged and quantized as its hooks say
    adapter_config.json  adapter_model.safetensors      what a run with the hook `adapt` has learned; several fit on one base

The base of an adapter is what the run began with: export that as a Hugging Face folder, and let peft put the adapter on it.
"""

import os

import msgspec
import orjson
from torch import Tensor

from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError
from datastore.formats.safetensors import HeaderTensor, encode_header
from datastore.training.export.export import QUANTIZATIONS, Exported, RestoredRun, empty_folder, model_of, restored
from datastore.training.export.llama_cpp import GGUF_TYPES, write_gguf
from datastore.training.hooks.adapt import Adapt
from datastore.training.hooks.bottleneck import refuse_unmerged
from datastore.training.run.folder import RunFolder

__all__ = ["export_adapter", "export_gguf", "export_other"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 32


def export_gguf(
    run: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    step: int | None = None,
    quantize: str | None = None,
    replace: bool = False,
) -> Exported:
    """Write the model of `run` at `step` (None: its newest sound checkpoint) as `model.gguf` to the folder `to`.

    `quantize`: "int8" or "int4" as we round, in groups of 32 and in the place of the run's own hooks that quantize; or the name of a type
    that the gguf package rounds to, such as "q5_0", for what is not quantized yet. Left out, matrices are stored in 16 bits.

    Raises:
        MissingError, ConflictError, CorruptError: as `export`.
        ConfigError: a GGUF file cannot hold the model.
    """
    if quantize is not None and quantize not in {*QUANTIZATIONS, *GGUF_TYPES}:
        raise ConfigError("unknown quantization", quantize=quantize, known=sorted({*QUANTIZATIONS, *GGUF_TYPES}))
    own = None if quantize is None else QUANTIZATIONS.get(quantize)
    target = empty_folder(os.fspath(to), replace=replace)
    built = restored(RunFolder.open(os.fspath(run)), step=step)
    in_blocks = None if own is None else msgspec.structs.replace(own, group=_BLOCK, file="gguf")
    loaded = model_of(built, instead=in_blocks)
    refuse_unmerged(loaded.model)
    files = write_gguf(target, loaded, quantize=quantize if own is None else None)
    return _told(target.url, built, files)


def export_adapter(
    run: str | os.PathLike[str], to: str | os.PathLike[str], *, step: int | None = None, replace: bool = False
) -> Exported:
    """Write the adapters of `run` at `step` (None: its newest sound checkpoint) to the folder `to`, as peft reads them.

    Bottlenecks are written as `add_bottlenecks` takes them, since peft has none.

    Raises:
        MissingError, ConflictError, CorruptError: as `export`.
        ConfigError: the run has none.
    """
    target = empty_folder(os.fspath(to), replace=replace)
    built = restored(RunFolder.open(os.fspath(run)), step=step)
    hook = next((one for one in built.hooks.values() if isinstance(one, Adapt)), None)
    if hook is None:
        raise ConfigError("the run has no adapters", run=os.fspath(run), hint='Train with a hook `use = "adapt"`.')
    config, tensors = hook.files(built.state.model)
    chunks = _safetensors(tensors)
    target.put("adapter_model.safetensors", *chunks)
    raw = orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n"
    target.put("adapter_config.json", raw)
    sizes = {"adapter_model.safetensors": sum(len(chunk) for chunk in chunks), "adapter_config.json": len(raw)}
    return _told(target.url, built, sizes)


def export_other(run: str, to: str, *, step: int | None, kind: str, quantize: str | None, replace: bool) -> Exported:
    """Write a GGUF file or a folder of peft, as `kind` ("gguf", "adapter") says.

    Raises:
        MissingError, ConflictError, CorruptError, ConfigError: as `export_gguf` and `export_adapter`; or adapters are to be quantized.
    """
    if kind == "gguf":
        return export_gguf(run, to, step=step, quantize=quantize, replace=replace)
    if quantize is not None:
        raise ConfigError("adapters are not quantized", quantize=quantize, hint="Leave out `quantize`, or export hf.")
    return export_adapter(run, to, step=step, replace=replace)


def _safetensors(tensors: dict[str, Tensor]) -> list[bytes]:
    ordered = sorted(tensors.items())
    header = [HeaderTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    return [
        bytes(encode_header(header, metadata={"format": "pt"})),
        *(tensor.detach().cpu().contiguous().numpy().tobytes() for _, tensor in ordered),
    ]


def _told(url: str, run: RestoredRun, files: dict[str, int]) -> Exported:
    return Exported(url=url, step=run.found.step, files=files, passed_over=run.found.passed_over)

"""Quantize or prune the folder `hf` with another library and print its loss and CPU seconds; run by `quantization` with its own Python."""

import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

warnings.simplefilter("ignore")


@torch.inference_mode()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    """Return the mean loss of the rows."""
    logits = torch.cat([model(part[:, :-1]).logits.float() for part in rows.split(16)])
    return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def pruning(kind: str) -> Any:
    """Return what lets half of the weights of all layers but the head go, at once."""
    method, _, pattern = kind.partition("-")
    options: dict[str, Any] = {
        "sparsity": 0.5,
        "mask_structure": pattern,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    if method == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier

        return WandaPruningModifier(**options)
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return SparseGPTModifier(**options)


def with_llmcompressor(model: Any, kind: str, calibration: torch.Tensor) -> None:
    """Quantize in place, with real weights on their grid behind it, or prune."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    bits = 8 if kind == "int8" else 4
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    if bits == 4:
        weights |= {"strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    options: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    if kind == "gptq4":
        recipe: Any = GPTQModifier(**options)
    elif kind.startswith(("sparsegpt", "wanda")):
        recipe = pruning(kind)
    elif kind == "awq4":
        from llmcompressor.modifiers.awq import AWQModifier

        recipe = AWQModifier(**options)
    else:
        oneshot(model=model, recipe=QuantizationModifier(**options))
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # It asks for a tokenizer, though there is nothing left to be done by one.
    names = Tokenizer(WordLevel({str(number): number for number in range(256)}, unk_token="0"))  # noqa: S106
    processor = PreTrainedTokenizerFast(tokenizer_object=names, pad_token="0")  # noqa: S106
    rows = calibration[:, :-1].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        processor=processor,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
    )


def with_torchao(model: Any, kind: str) -> None:
    """Quantize in place."""
    from torchao import quantization
    from torchao.quantization import quantize_

    if kind == "int8":
        quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        from torchao.quantization.granularity import PerGroup

        quantize_(
            model,
            quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        )


def main() -> None:
    """Do what the first argument names, in the folder that the second one is."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    library, _, kind = sys.argv[1].partition("-")
    folder = Path(sys.argv[2])
    rows = torch.from_numpy(np.load(folder / "rows.npy")).long()
    calibration = torch.from_numpy(np.load(folder / "calibration.npy").astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    started = time.process_time()
    if library == "torchao":
        with_torchao(model, kind)
    else:
        with_llmcompressor(model, kind, calibration)
    seconds = time.process_time() - started
    versions = f"{library} {version(library)}"
    print("RESULT", json.dumps({"loss": loss_of(model, rows), "seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()

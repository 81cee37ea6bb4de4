"""Model FLOPs utilization: the arithmetic that training a token needs, over what the device could do in that time.

    6 x parameters + 12 x layers x width x seq_len     FLOPs per token, forward and backward, attention not halved for causality

Source: A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B; peaks from the makers' data sheets, dense bf16.
"""

import torch

from datastore.training.settings import ModelSettings

__all__ = ["flops_per_token", "peak_flops"]

_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def flops_per_token(shape: ModelSettings, *, parameters: int, seq_len: int) -> float:
    """Return the FLOPs of training on one token; `parameters` counts a tied embedding once, as it is multiplied once."""
    return 6.0 * parameters + 12.0 * shape.layers * shape.width * seq_len


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of `device` per second in bf16; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)

"""The machine that a rank runs on: what settings that say "auto" become here, and how much of its peak is used.

Model FLOPs utilization is the arithmetic that training a token needs, over what the device could do in that time.

    6 x parameters + 12 x layers x width x seq_len     FLOPs per token, forward and backward, attention not halved for causality

Source: A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B; peaks from the makers' data sheets, dense bf16.
"""

from dataclasses import dataclass

import torch
from torch import nn

from datastore.digest import digest_bytes
from datastore.errors import ConfigError
from datastore.host import cores, resident_bytes
from datastore.training.launcher import Launch
from datastore.training.models.float8 import FLOAT8, check_float8, use_float8
from datastore.training.models.huggingface import blocks_of
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.ranks import Ranks
from datastore.training.settings import ModelSettings, StepSettings

__all__ = [
    "Machine",
    "device_memory",
    "device_name",
    "flops_per_token",
    "peak_flops",
    "pick_device",
    "precision_of",
    "seed_step",
    "signed",
    "use_machine",
]


def pick_device(wanted: str, launch: Launch) -> torch.device:
    """Return the device of this rank for the setting "auto", "cpu" or "cuda".

    Raises:
        ConfigError: "cuda" without a GPU for each rank of this machine.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not found):
        return torch.device("cpu")
    if found <= launch.local_rank:
        raise ConfigError(
            "not enough GPUs",
            found=found,
            ranks_here=launch.local_world,
            hint='Start fewer, or set train.device = "cpu".',
        )
    return torch.device("cuda", launch.local_rank)


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({cores()} cores)"


def device_memory(device: torch.device) -> int:
    """Return the bytes that this process has of the memory of `device`; of a CPU, all that it has."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()


@dataclass(frozen=True, slots=True)
class Machine:
    """What the settings that say "auto" became here."""

    precision: str
    compiled: bool
    threads: int
    fp8_scales: str = "tensorwise"

    def fit(self, model: nn.Module) -> None:
        """Let `model` compute as this machine is to.

        Raises:
            ConfigError, DependencyError: as `use_float8`.
        """
        if self.precision in FLOAT8:
            use_float8(model, precision=self.precision, recipe=self.fp8_scales)
        for block in blocks_of(model) if self.compiled else ():
            block.compile()  # Each by itself: the same code, so it is compiled once, and hooks keep their modules.


def use_machine(settings: StepSettings, ranks: Ranks, layout: Layout, *, threads: int) -> Machine:
    """Set torch up for this rank; `threads` is what an earlier session used, 0 if there was none."""
    device = ranks.device
    threads = settings.threads or threads or max(1, cores() // ranks.launch.local_world)
    torch.set_num_threads(threads)
    # On a CPU every kernel used here gives the same bits each time; the switch would only slow down what is not used.
    torch.use_deterministic_algorithms(settings.deterministic and device.type == "cuda", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = precision_of(settings, device)
    fit = device.type == "cuda" and layout.tensor == 1
    compiled = fit if settings.compile == "auto" else settings.compile
    return Machine(precision, compiled, threads, settings.fp8_scales)


def precision_of(settings: StepSettings, device: torch.device) -> str:
    """Return in which precision `device` computes, "auto" resolved.

    Raises:
        ConfigError, DependencyError: as `check_float8`.
    """
    if settings.precision != "auto":
        check_float8(settings.precision, device)
        return settings.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16"))
    return "bf16" if native else "fp32"


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
    return 6.0 * parameters + 12.0 * shape.layers * shape.heads * shape.head_size * seq_len


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak of `device` per second in bf16, and in fp8 twice as much; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for part, peak in _PEAKS.items() if part in name), None)
    return known * 2 if known is not None and precision == "fp8" else known


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for the step after `step` steps: a resumed run draws what the undisturbed one would have drawn."""
    torch.manual_seed(int.from_bytes(digest_bytes(f"{seed}/{step}/{rank}".encode())[:8], "big"))


def signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned `value`: devices add up no other."""
    return value - 2**64 if value >= 2**63 else value

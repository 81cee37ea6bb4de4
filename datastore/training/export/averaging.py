"""The mean of some steps of a run, as a Hugging Face folder: often better than each of them, for nothing but their storage.

Each step leaves training as any export does, through the run's hooks, and what comes out is averaged, in float64. Where a weight is zero
in all of them, so it is in the mean.

Source: P. Izmailov et al., "Averaging weights leads to wider optima", arXiv:1803.05407.
"""

import os

import torch
from torch import Tensor

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.errors import ConfigError, ConflictError
from datastore.storage.resolve import open_storage
from datastore.training.export.export import Exported, open_model
from datastore.training.export.huggingface import write_folder
from datastore.training.hooks.bottleneck import refuse_unmerged
from datastore.training.run.folder import RunFolder
from datastore.units import Progress

__all__ = ["average"]


@torch.no_grad()
def average(
    run: str | os.PathLike[str], to: str | os.PathLike[str], *, last: int = 3, progress: Progress | None = None
) -> Exported:
    """Write the mean of the `last` steps of `run` that are stored to the folder `to`. `progress` gets the steps that were read, and all.

    Raises:
        MissingError: there is no run.
        ConflictError: the folder holds something.
        ConfigError: fewer steps are stored, or what leaves training is quantized.
        CorruptError: a checkpoint is damaged.
    """
    folder, target = RunFolder.open(os.fspath(run)), open_storage(os.fspath(to))
    folder.config()
    occupied = next((found.key for found in target.list()), None)
    if occupied is not None:
        raise ConflictError("the folder is not empty", url=target.url, found=occupied, hint="Name another one.")
    with Checkpointer(folder.storage) as checkpointer:
        steps = checkpointer.steps()
    if not 0 < last <= len(steps):
        raise ConfigError(
            "so many steps are not stored",
            asked=last,
            stored=list(steps),
            hint="Ask for fewer, or raise checkpoint.keep before the run.",
        )
    sums: dict[str, Tensor] = {}
    for number, step in enumerate(steps[-last:], start=1):
        found = open_model(folder.url, step=step)
        refuse_unmerged(found.model)
        for name, tensor in found.model.state_dict().items():
            if not tensor.is_floating_point():
                raise ConfigError(
                    "a quantized model has no mean", tensor=name, hint="Leave out the hook that quantizes."
                )
            sums[name] = sums[name] + tensor if name in sums else tensor.double()
        if progress is not None:
            progress(number, last)
    found.model.load_state_dict({name: one / last for name, one in sums.items()})
    files = write_folder(target, found)
    return Exported(url=target.url, step=steps[-1], files=files)

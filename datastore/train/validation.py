"""The validation loss of a model outside of training: of a checkpoint, or of a folder that was exported from it."""

import torch

from datastore.errors import ConfigError
from datastore.loader.place import Place
from datastore.storage.resolve import open_storage
from datastore.training.distributed import Ranks
from datastore.training.export.export import open_model
from datastore.training.launcher import Launch
from datastore.training.run.folder import RunFolder, is_run, open_split
from datastore.training.validation import Evaluation, validation_loss

__all__ = ["evaluate"]

_ROWS = 16


def evaluate(source: str, *, run: str = "", step: int | None = None, samples: int = 0) -> Evaluation:
    """Return the loss of the model at `source` on what `run` holds out, in float32 on the CPU.

    `source` is a run (at `step`, or its newest checkpoint) or a Hugging Face folder; `run` may be left out if `source` is
    one. `samples` 0: as many as the run validates on.

    Raises:
        MissingError: no model, no run, or no dataset there.
        ConfigError: there is no run whose samples could be used, or it holds nothing out.
    """
    run = run or source
    if not is_run(open_storage(run)):
        raise ConfigError("no run says what to validate on", source=source, hint="Name the run that the model is from.")
    config = RunFolder.open(run).config()
    settings = config.settings
    held_out = open_split(config).samples(
        samples or settings.eval.samples, seq_len=settings.data.seq_len, place=Place(), options=settings.loader
    )
    ranks = Ranks(Launch(), torch.device("cpu"), None)
    model = open_model(source, step=step).model
    return validation_loss(model, held_out, ranks=ranks, precision="fp32", rows=_ROWS)

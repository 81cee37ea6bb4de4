"""Turns of other trainers for tools/bench/trainer: the same model, optimizer, precision and rows, all that they do beside left off.

A turn is timed from the beginning of its first step to the end of its last one: what they do before and after is not in it.
"""

import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from _report import Sample

from datastore.training.optim import make_optimizer
from datastore.training.settings import Settings

__all__ = ["HuggingFace", "Lightning"]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of a plain file of tokens."""

    def __init__(self, tokens: Path, length: int) -> None:
        self.map, self.length = np.memmap(tokens, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return (len(self.map) - 1) // self.length

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        one = torch.from_numpy(self.map[row * self.length : row * self.length + self.length + 1].astype(np.int64))
        return {"input_ids": one[:-1], "labels": one[1:]}


class Losing(nn.Module):
    """A model that returns its loss, as both want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean loss."""
        logits = self.model(input_ids)
        return {"loss": functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


class Clock:
    """From the first step to the last."""

    def __init__(self) -> None:
        self.began: tuple[float, float] | None = None
        self.sample = Sample(0.0, 0.0)

    def begin(self) -> None:
        """Note the time, if it is the first step."""
        self.began = self.began or (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """Note the time again."""
        assert self.began is not None
        self.sample = Sample(time.perf_counter() - self.began[0], time.process_time() - self.began[1])


class HuggingFace:
    """`transformers.Trainer`."""

    def __init__(self, model: nn.Module, tokens: Path, settings: Settings, precision: str) -> None:
        self.model, self.settings, self.precision = Losing(model), settings, precision
        self.rows = Rows(tokens, settings.data.seq_len)
        self.optimizer = make_optimizer(model.parameters(), settings.optim)

    def run(self, steps: int) -> Sample:
        """Take `steps` steps."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        clock = Clock()

        class Timed(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end()

        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.settings.data.global_batch,
                max_grad_norm=self.settings.optim.clip,
                bf16=self.precision == "bf16",
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_num_workers=0,
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _step: 1.0)
            Trainer(
                model=self.model,
                args=arguments,
                train_dataset=self.rows,
                optimizers=(self.optimizer, schedule),
                callbacks=[Timed()],
            ).train()
        return clock.sample


class Lightning:
    """`pytorch_lightning.Trainer`."""

    def __init__(self, model: nn.Module, tokens: Path, settings: Settings, precision: str) -> None:
        self.model, self.settings, self.precision = Losing(model), settings, precision
        self.rows = Rows(tokens, settings.data.seq_len)
        self.optimizer = make_optimizer(model.parameters(), settings.optim)

    def run(self, steps: int) -> Sample:
        """Take `steps` steps."""
        import pytorch_lightning as lightning

        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        clock, outer = Clock(), self

        class Module(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.inner = outer.model

            def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
                return self.inner(**batch)["loss"]

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return outer.optimizer

            def on_train_batch_start(self, *_: Any) -> None:
                clock.begin()

            def on_train_batch_end(self, *_: Any) -> None:
                clock.end()

        loader = torch.utils.data.DataLoader(self.rows, batch_size=self.settings.data.global_batch, shuffle=True)
        lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision="bf16-mixed" if self.precision == "bf16" else "32-true",
            gradient_clip_val=None,  # It refuses to clip where the optimizer is fused: the others do it.
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=os.devnull,
        ).fit(Module(), loader)
        return clock.sample

"""The Lightning side of training: one module and two callbacks. Imported only when a run starts."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pycnf.objective import Objective
from pycnf.records import write_bytes
from pycnf.training.batches import Rows, seed_all
from pycnf.training.evaluation import Evaluation
from pycnf.training.folder import TENSORBOARD, Row, RunFolder, read_checkpoint
from pycnf.training.options import TrainingOptions
from pycnf.training.task import Task
from pycnf.training.weights import WeightControl

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}
TENSORBOARD_EVERY = 10  # training steps between two points of a TensorBoard curve


class NonFiniteLoss(RuntimeError):
    """Report a loss that is NaN or infinite, before it reaches the weights."""


class FlowModule(LightningModule):
    """Train a model on its objective; everything random in a step is drawn from (seed, step)."""

    def __init__(self, task: Task, options: TrainingOptions) -> None:
        super().__init__()
        self.flow, self.task, self.options = task.model, task, options
        self.weights = WeightControl(task.regularizers)
        self.first_steps: tuple[float, ...] | None = None
        self.result: Objective | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what steering has made of the weights of the regularizers, and the steps to start with."""
        checkpoint["weights"], checkpoint["first_steps"] = self.weights.powers, self.first_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up steering and steps where they were left."""
        self.weights.powers = list(checkpoint.get("weights", self.weights.powers))
        self.first_steps = checkpoint.get("first_steps")

    def on_train_batch_start(self, batch: Rows, batch_idx: int) -> None:
        """Seed the generators for this step."""
        seed_all(self.options.seed, self.trainer.global_step, stream=2, device=self.device)

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        step = self.trainer.global_step
        self.result = self.task.objective(batch, step, self.weights.factors(step), self.first_steps)
        if self.options.warm_start:
            self.first_steps = self.result.solution.openings
        self.weights.update(self.result.solution.stats.nfe)
        if not torch.isfinite(self.result.loss):
            parts = {"nll": self.result.nll, **self.result.penalties}
            values = ", ".join(f"{name} = {value.item():.6g}" for name, value in parts.items())
            raise NonFiniteLoss(f"the loss is not finite ({values}). Try: a smaller lr, gradient clipping (clip=1.0)")
        return self.result.loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with a cosine schedule where asked for."""
        options = self.options
        parameters = [p for p in self.flow.parameters() if p.requires_grad]
        settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
        if options.optimizer != "adamax" and parameters[0].device.type in ("cpu", "cuda"):
            settings["fused"] = True  # one kernel for all parameters
        optimizer = OPTIMIZERS[options.optimizer](parameters, **settings)
        if options.schedule != "cosine":
            return optimizer
        cosine = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / options.max_steps, 1.0))))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Recorder(Callback):
    """Keep a row of numbers a step, in memory and in the run folder."""

    def __init__(self, folder: RunFolder | None, columns: list[str], *, lr: float, bar: str | None) -> None:
        self.folder, self.columns, self.lr = folder, columns, lr
        self.history: list[Row] = []
        self._unwritten: list[Row] = []
        self._bar_label, self._began = bar, 0.0
        self._bar: _ProgressBar | None = None
        self._board: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the curves and the progress bar, start the clock."""
        step = trainer.global_step
        if self.folder is not None:
            from tensorboardX import SummaryWriter

            purge = step + 1 if step else None
            self._board = SummaryWriter(str(self.folder.path / TENSORBOARD), purge_step=purge)
        if self._bar_label is not None:
            self._bar = _ProgressBar(self._bar_label, step, int(trainer.max_steps))
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the learning rate of the step, which a schedule changes before its end."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step; the backward evaluations are known by now."""
        if not isinstance(pl_module, FlowModule) or pl_module.result is None:
            return
        result, pl_module.result = pl_module.result, None
        stats = result.solution.stats
        row: Row = {
            "step": trainer.global_step,
            "split": "train",
            "loss": result.loss.item(),
            "nll": result.nll.item(),
            "nfe": stats.nfe,
            "nfe_backward": stats.nfe_backward,
            "accepted": stats.accepted,
            "rejected": stats.rejected,
            "stopped": int(stats.stopped),
            "lr": self.lr,
        }
        row |= {f"penalty_{name}": value.item() for name, value in result.penalties.items()}
        row |= {name: getattr(result, name).item() for name in pl_module.task.columns}
        row |= {f"weight_{name}": weight for name, weight in result.weights.items()}
        row["seconds"] = time.perf_counter() - self._began
        self._add(row)
        if self._bar is not None:
            self._bar.show(row)

    def restart_clock(self) -> None:
        """Start the next step's clock: what came before it is not training."""
        self._began = time.perf_counter()

    def add_validation(self, step: int, lr: float, result: Evaluation) -> None:
        """Record a validation."""
        row = {
            "step": step,
            "split": "validation",
            "nll": result.nll,
            "nfe": result.nfe,
            "accepted": result.accepted,
        }
        self._add(row | {"rejected": result.rejected, "lr": lr, "seconds": result.seconds})
        if self._bar is not None:
            self._bar.show_validation(result.nll)

    def flush(self) -> None:
        """Write the rows that are not on disk yet."""
        if self.folder is not None and self._unwritten:
            rows, self._unwritten = self._unwritten, []
            self.folder.append_metrics(rows, self.columns)
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the progress bar, write what is left, close the files."""
        if self._bar is not None:
            self._bar.close()
        self.flush()
        if self._board is not None:
            self._board.close()

    def _add(self, row: Row) -> None:
        self.history.append(row)
        if self.folder is None:
            return
        self._unwritten.append(row)
        if self._board is not None and (row["split"] != "train" or row["step"] % TENSORBOARD_EVERY == 0):
            for name in row.keys() - {"step", "split"}:
                self._board.add_scalar(f"{row['split']}/{name}", row[name], row["step"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint as a whole or not at all; read it without running code from it."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(path, buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Row:
        """Read a checkpoint."""
        return read_checkpoint(Path(path))


class _ProgressBar:
    """Show step, loss, NLL and evaluations on one line of the terminal."""

    def __init__(self, label: str, step: int, max_steps: int) -> None:
        from tqdm import tqdm

        interval = 0.2 if sys.stderr.isatty() else 5.0
        self._bar = tqdm(
            total=max_steps, initial=step, desc=label, unit="step", mininterval=interval, dynamic_ncols=True
        )
        self._step, self._held_out = "", ""

    def show(self, row: Row) -> None:
        """Move to the end of a step."""
        self._step = f"loss {row['loss']:.4g}, nfe {row['nfe']}, backward {row['nfe_backward']}"
        self._bar.set_postfix_str(self._step + self._held_out, refresh=False)
        self._bar.update(1)

    def show_validation(self, nll: float) -> None:
        """Show a new held-out NLL."""
        self._held_out = f", held-out nll {nll:.4g}"
        self._bar.set_postfix_str(self._step + self._held_out)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

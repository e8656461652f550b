"""The files of a run: configuration, checkpoints, summary.csv and logs."""

from collections import OrderedDict
from pathlib import Path
from typing import Optional

import torch
import yaml
from timm.utils import trim_summary, update_summary

from ..errors import as_user_error
from .checkpoint import CheckpointSaver
from .config import TrainConfig
from .logs import MetricLoggers
from .trainer import EpochResult

__all__ = ['RunFolder']


class RunFolder:
    """Writes the files of a run, in the primary process.

    Args:
        config: Configuration of the training.
        folder: Where the files go.
        start_epoch: The first epoch of this run; rows of later epochs are removed from the summary.
        best_metric: Best metric so far.

    Raises:
        UserError: The folder cannot be written, or a log not opened.
    """

    def __init__(self, config: TrainConfig, folder: Path, start_epoch: int, best_metric: float):
        with as_user_error(f'--output {config.run.output!r} cannot be written'):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'args.yaml').write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
            self.saver = CheckpointSaver(folder, keep=config.run.checkpoint_hist, best_metric=best_metric)
            self.summary = folder / 'summary.csv'
            trim_summary(str(self.summary), start_epoch)
        self.logs = MetricLoggers(config.log, folder, config.to_dict())

    def add(self, epoch: int, result: EpochResult, weights: Optional[torch.Tensor]) -> None:
        """Add a finished epoch.

        Args:
            epoch: Number of the epoch.
            result: Losses and metrics of the epoch.
            weights: Mean mixing weights of the teachers, [K, K], None without teachers.

        Raises:
            UserError: They cannot be written.
        """
        metrics = OrderedDict(mean_top1=result.evaluation.mean_top1)
        for k, exit_metrics in enumerate(result.evaluation.exits, 1):
            metrics.update({f'Ex{k}_top1': exit_metrics.top1, f'Ex{k}_loss': exit_metrics.loss})
        values = dict(result.losses, lr=result.lr, images_per_s=result.speed)
        with as_user_error(f'what epoch {epoch} came to cannot be written into {str(self.summary.parent)!r}'):
            is_new = not self.summary.exists()
            update_summary(epoch, result.losses, metrics, filename=str(self.summary), lr=result.lr, write_header=is_new)
            self.logs.add(epoch, {**values, **{f'val_{name}': value for name, value in metrics.items()}}, weights)

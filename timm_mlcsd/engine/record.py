"""What a run leaves behind: its folder with arguments, checkpoints, summary.csv and logs."""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Dict, Optional

import torch
import yaml
from timm.utils import trim_summary, update_summary

from ..errors import blame
from .checkpoint import CheckpointSaver
from .evaluate import Evaluation
from .logs import Logs

__all__ = ['RunRecord']


class RunRecord:
    """The files of a run; one process alone writes them.

    Args:
        args: The flags.
        folder: Where they go.
        start_epoch: The first epoch to come; what a resumed run says of later ones is dropped.
        best_metric: Best metric so far.

    Raises:
        UserError: The folder cannot be written, or a log not opened.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, start_epoch: int, best_metric: float):
        with blame(f'--output {args.output!r} cannot be written'):
            folder.mkdir(parents=True, exist_ok=True)
        self.logs = Logs(args, folder)
        (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args), sort_keys=False))
        self.saver = CheckpointSaver(folder, keep=args.checkpoint_hist, best_metric=best_metric)
        self.summary = folder / 'summary.csv'
        trim_summary(str(self.summary), start_epoch)

    def add(
        self,
        epoch: int,
        losses: Dict[str, float],
        result: Evaluation,
        lr: float,
        speed: float,
        weights: Optional[torch.Tensor],
    ) -> None:
        """Add a finished epoch.

        Args:
            epoch: Its number.
            losses: The loss and its parts.
            result: What the exits get right.
            lr: Learning rate, mean over the groups.
            speed: Images trained on per second.
            weights: The teachers' mean mixing weights [K, K], where there are any.
        """
        metrics = OrderedDict(mean_top1=result.mean_top1)
        for k, exit_metrics in enumerate(result.exits, 1):
            metrics.update({f'Ex{k}_top1': exit_metrics.top1, f'Ex{k}_loss': exit_metrics.loss})
        update_summary(
            epoch, losses, metrics, filename=str(self.summary), lr=lr, write_header=not self.summary.exists()
        )
        if self.logs.open:
            values = dict(losses, lr=lr, images_per_s=speed, **{f'val_{k}': v for k, v in metrics.items()})
            self.logs.add(epoch, values, weights)

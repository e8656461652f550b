"""Loggers of an epoch's metrics beside summary.csv: TensorBoard, Weights & Biases, trackio."""

import importlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from ..errors import UserError, as_user_error, install_hint

__all__ = ['LOGS', 'LogConfig', 'MetricLoggers', 'check_packages']

CELL = 24  # pixels at each side of a cell of the CWEM's picture


@dataclass
class LogConfig:
    """Where the numbers of an epoch go beside summary.csv.

    Attributes:
        log_tensorboard: Whether TensorBoard gets them.
        log_wandb: Whether Weights & Biases gets them.
        log_trackio: Whether trackio gets them.
        log_project: Project at the latter two.
    """

    log_tensorboard: bool = False
    log_wandb: bool = False
    log_trackio: bool = False
    log_project: str = 'timm_mlcsd'


class MetricLoggers:
    """The loggers that are switched on; each epoch's metrics are sent to all of them.

    Args:
        config: Which loggers are on.
        folder: Folder of the run.
        settings: Settings of the run by name, for the loggers that keep them.

    Raises:
        UserError: A package is missing, or a service refuses.
    """

    def __init__(self, config: LogConfig, folder: Path, settings: Dict[str, Any]):
        self.open: List[Any] = []
        for name, make in LOGS.items():
            if getattr(config, f'log_{name}'):
                with as_user_error(f'--log-{name} cannot be used'):
                    self.open.append(make(config, folder, settings))

    def add(self, epoch: int, values: Dict[str, float], weights: Optional[torch.Tensor] = None) -> None:
        """Add an epoch.

        Args:
            epoch: Number of the epoch.
            values: Metrics by name.
            weights: Mean mixing weights of the teachers, [K, K], drawn white for 1.
        """
        picture = None
        if weights is not None:
            cells = torch.ones(CELL, CELL, device=weights.device)
            picture = torch.kron(weights.float(), cells).clamp(0, 1).mul(255).byte().cpu()
        for log in self.open:
            log.add(epoch, values, picture)

    def close(self) -> None:
        """Close all loggers."""
        for log in self.open:
            log.close()


class _TensorBoard:
    """Event files in the folder of the run."""

    def __init__(self, config: LogConfig, folder: Path, settings: Dict[str, Any]):
        self.writer = _package('torch.utils.tensorboard', 'tensorboard').SummaryWriter(str(folder))

    def add(self, epoch: int, values: Dict[str, float], picture: Optional[torch.Tensor]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        if picture is not None:
            self.writer.add_image('teachers', picture, epoch, dataformats='HW')

    def close(self) -> None:
        self.writer.close()


class _Service:
    """A package with wandb's interface, which trackio shares.

    Attributes:
        name: Name of the package.
    """

    name: str

    def __init__(self, config: LogConfig, folder: Path, settings: Dict[str, Any]):
        self.module = _package(self.name, self.name)
        self.run = self.module.init(project=config.log_project, name=folder.name, config=settings, **self.more(folder))

    def more(self, folder: Path) -> Dict[str, Any]:
        """Arguments of ``init`` that only this service needs."""
        raise NotImplementedError

    def add(self, epoch: int, values: Dict[str, float], picture: Optional[torch.Tensor]) -> None:
        pictures = {} if picture is None else {'teachers': self.module.Image(picture.numpy())}
        self.module.log({**values, **pictures}, step=epoch)

    def close(self) -> None:
        self.module.finish()


class _WandB(_Service):
    name = 'wandb'

    def more(self, folder: Path) -> Dict[str, Any]:
        # a name may be taken again, an id never
        path = folder / 'wandb-id.txt'
        with as_user_error(f'--log-wandb: {str(path)!r}'):
            if not path.exists():
                path.write_text(uuid.uuid4().hex[:8])
            return dict(dir=str(folder), id=path.read_text(), resume='allow')


class _Trackio(_Service):
    name = 'trackio'

    def more(self, folder: Path) -> Dict[str, Any]:
        return dict(resume='allow')


LOGS = {'tensorboard': _TensorBoard, 'wandb': _WandB, 'trackio': _Trackio}


def check_packages(config: LogConfig) -> None:
    """Check that the packages of the loggers are installed.

    Raises:
        UserError: It isn't.
    """
    for name in LOGS:
        if getattr(config, f'log_{name}'):
            _package('torch.utils.tensorboard' if name == 'tensorboard' else name, name)


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f'--log-{extra} needs a package ({e}); {install_hint(extra)}.') from None

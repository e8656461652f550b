"""The whole configuration of a training: what train.py's flags set, and what a run writes into args.yaml."""

from dataclasses import dataclass, field

from .build import LossConfig, ModelConfig
from .data_config import TrainDataConfig
from .device import DeviceConfig
from .epoch import LoopConfig
from .flat_config import FlatConfig
from .loaders import AugmentConfig
from .logs import LogConfig
from .optimizer import OptimizerConfig, SchedulerConfig
from .resume import RunConfig

__all__ = ['TrainConfig', 'TrainerConfig']


@dataclass
class TrainerConfig:
    """Seed, averaged weights, and how several processes train together.

    Attributes:
        seed: Seed of weights, order and augmentation.
        model_ema: Whether an average of the weights is kept and evaluated.
        model_ema_decay: Decay of that average per update.
        model_ema_warmup: Whether the decay grows from 0.
        dist_bn: BatchNorm's statistics after an epoch: ``reduce`` for the mean over the processes, ``broadcast`` for
            those of the first, empty to leave them.
        fsdp: Whether parameters and optimizer state are sharded (FSDP2).
        sync_bn: Whether BatchNorm normalises over all processes.
    """

    seed: int = 42
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    dist_bn: str = 'reduce'
    fsdp: bool = False
    sync_bn: bool = False


@dataclass
class TrainConfig(FlatConfig):
    """A training, one part per owner; the names of all fields are those of train.py's flags.

    Examples:
        ```python
        with open('configs/quickstart.yaml') as recipe:
            config = TrainConfig.from_dict(yaml.safe_load(recipe))
        config.model.exits = 4
        folder = train(config)
        ```
    """

    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)

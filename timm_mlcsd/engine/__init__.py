"""Training and evaluation as an API: configurations, `train`, `Trainer`, `Evaluator`, `validate`."""

from .build import LossConfig, ModelConfig
from .config import TrainConfig, TrainerConfig
from .data_config import DataConfig, TrainDataConfig
from .datasets import load_dataset
from .device import DeviceConfig
from .epoch import LoopConfig
from .evaluator import Evaluation, Evaluator, ExitMetrics, LabelledLogits
from .loaders import AugmentConfig
from .logs import LogConfig
from .optimizer import OptimizerConfig, SchedulerConfig
from .resume import RunConfig
from .trainer import EpochResult, Trainer
from .training import train
from .validate_config import ValidateConfig
from .validation import validate

__all__ = [
    'AugmentConfig',
    'DataConfig',
    'DeviceConfig',
    'EpochResult',
    'Evaluation',
    'Evaluator',
    'ExitMetrics',
    'LabelledLogits',
    'LogConfig',
    'LoopConfig',
    'LossConfig',
    'ModelConfig',
    'OptimizerConfig',
    'RunConfig',
    'SchedulerConfig',
    'TrainConfig',
    'TrainDataConfig',
    'Trainer',
    'TrainerConfig',
    'ValidateConfig',
    'load_dataset',
    'train',
    'validate',
]

"""Multi-exit networks: the common interface, timm backbones with exits, networks designed with exits, the registry."""

from .backbone import DEFAULT_EXIT_HEAD, DEFAULT_EXIT_POOL, MultiExitBackbone, create_multi_exit
from .heads import EXIT_HEADS, EXIT_POOLS, ExitHead
from .msdnet import MSDNet
from .multi_exit import MultiExitModel, MultiExitOutput
from .ranet import RANet
from .registry import create_model  # registers mlcsd_* with timm
from .shufflenetv2 import ShuffleNetV2
from .stages.meta import MetaRunner, eval_mode
from .stages.taps import find_hooked
from .weights import load_backbone, read_weights, weights_digest

__all__ = [
    'DEFAULT_EXIT_HEAD',
    'DEFAULT_EXIT_POOL',
    'EXIT_HEADS',
    'EXIT_POOLS',
    'ExitHead',
    'MSDNet',
    'MultiExitBackbone',
    'MultiExitModel',
    'MultiExitOutput',
    'MetaRunner',
    'RANet',
    'ShuffleNetV2',
    'create_multi_exit',
    'create_model',
    'eval_mode',
    'find_hooked',
    'load_backbone',
    'read_weights',
    'weights_digest',
]

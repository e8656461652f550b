"""Multi-exit networks from timm backbones, trained by multi-level collaborative self-distillation.

Importing this package registers its models with timm: ``timm.create_model('mlcsd_resnet18')``.
"""

from .hub import from_pretrained, push_to_hub, save_pretrained
from .losses import MLCSDLoss
from .models import MultiExitModel, MultiExitOutput, create_multi_exit, load_backbone
from .task import MLCSDTask
from .version import __version__

__all__ = [
    'MLCSDLoss',
    'MLCSDTask',
    'MultiExitModel',
    'MultiExitOutput',
    '__version__',
    'create_multi_exit',
    'from_pretrained',
    'load_backbone',
    'push_to_hub',
    'save_pretrained',
]

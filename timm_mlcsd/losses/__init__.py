"""Losses of multi-exit networks; they know nothing of backbones."""

from .mlcsd import CWEM, CWEM_SUPERVISIONS, DISTILLS, MLCSDLoss
from .teachers import LastExit

__all__ = ['CWEM', 'CWEM_SUPERVISIONS', 'DISTILLS', 'LastExit', 'MLCSDLoss']

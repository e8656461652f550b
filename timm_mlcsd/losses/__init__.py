"""Losses of multi-exit networks; they know nothing of backbones."""

from .distill import CC, CRD, DKD, KD, METHODS, Lesson, Method
from .memory import LogitMemory
from .mlcsd import CWEM_SUPERVISIONS, DISTILLS, MLCSDLoss
from .ramp import DISTILL_RAMPS, AccuracyRamp
from .teachers import CWEM, TEACHERS, Mixer

__all__ = [
    'CC',
    'CRD',
    'CWEM',
    'CWEM_SUPERVISIONS',
    'DISTILLS',
    'DISTILL_RAMPS',
    'DKD',
    'KD',
    'METHODS',
    'TEACHERS',
    'AccuracyRamp',
    'Lesson',
    'LogitMemory',
    'MLCSDLoss',
    'Method',
    'Mixer',
]

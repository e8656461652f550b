"""Losses for multi-exit networks, independent of the backbone."""

from .distill import CC, CRD, DISTILL_METHODS, DKD, KD, DistillBatch, DistillMethod
from .mlcsd import CWEM_SUPERVISIONS, MLCSDLoss
from .ramp import DISTILL_RAMPS, AccuracyRamp
from .teachers import CWEM, TEACHERS, TeacherMixer

__all__ = [
    'CC',
    'CRD',
    'CWEM',
    'CWEM_SUPERVISIONS',
    'DISTILL_RAMPS',
    'DKD',
    'KD',
    'DISTILL_METHODS',
    'TEACHERS',
    'AccuracyRamp',
    'DistillBatch',
    'MLCSDLoss',
    'DistillMethod',
    'TeacherMixer',
]

"""Labels for images: a few in the terminal, or many in a file."""

from .config import LABEL_TYPES, OUTPUT_TYPES, PredictConfig
from .images import find_images
from .network import choose_policy, labels, load
from .predictor import predict_to_file

__all__ = [
    'LABEL_TYPES',
    'OUTPUT_TYPES',
    'PredictConfig',
    'choose_policy',
    'find_images',
    'labels',
    'load',
    'predict_to_file',
]

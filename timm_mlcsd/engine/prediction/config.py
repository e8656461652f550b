"""The configuration of a prediction: what mlcsd-predict's flags set."""

from dataclasses import dataclass, field
from typing import List, Optional

from ..data_config import DataConfig
from ..device import DeviceConfig
from ..flat_config import FlatConfig

__all__ = ['LABEL_TYPES', 'OUTPUT_TYPES', 'PredictConfig']

LABEL_TYPES = ('name', 'description', 'detailed', 'none')
OUTPUT_TYPES = ('prob', 'logit')


@dataclass
class PredictConfig(FlatConfig):
    """A prediction; the names of all fields are those of mlcsd-predict's flags.

    Attributes:
        data: Data set, batch size and workers.
        device: Device, precision and memory format.
        network: Checkpoint of train.py, folder of a run, saved folder, or ``hf-hub:REPO``.
        images: Image files, folders of images, or patterns of them; empty where the data names a data set.
        split: Split of a data set.
        threshold: Top probability at which an image leaves; None for the exit policy beside the weights.
        no_policy: Whether the last exit answers every image.
        use_ema: Whether the averaged weights of the checkpoint are used.
        topk: Number of labels per image, None for the default.
        label_type: Kind of label, one of `LABEL_TYPES`; None for names, or descriptions of ImageNet's classes.
        output: File of the predictions, .csv, .jsonl or .parquet; None for none.
        resume: Whether an existing file is continued.
        include_index: Whether the file has class indices beside the labels.
        output_type: Value beside a label, one of `OUTPUT_TYPES`.
        filename_col: Name of the column with files or numbers.
    """

    data: DataConfig = field(default_factory=DataConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    network: str = ''
    images: List[str] = field(default_factory=list)
    split: str = 'validation'
    threshold: Optional[float] = None
    no_policy: bool = False
    use_ema: bool = False
    topk: Optional[int] = None
    label_type: Optional[str] = None
    output: Optional[str] = None
    resume: bool = False
    include_index: bool = False
    output_type: str = 'prob'
    filename_col: str = 'filename'

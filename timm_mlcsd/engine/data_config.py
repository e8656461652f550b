"""Configuration of the data of a training or an evaluation."""

import os
from dataclasses import dataclass, field
from typing import List, Optional

__all__ = ['DataConfig', 'TrainDataConfig']


@dataclass
class DataConfig:
    """Data sets, how their images are read and prepared, and how they are batched.

    Fields are the flags of the same names; `timm_mlcsd.cli` documents them.

    Attributes:
        data_dir: Folder with the data.
        dataset: Type of the data, in timm's form; empty for folders of images.
        dataset_download: Whether data may be downloaded.
        dataset_trust_remote_code: Whether a data set of the Hub may run its code.
        class_map: File that maps class names to indices.
        input_img_mode: Pillow mode of the images, None for RGB or L.
        input_key: Column with the images.
        target_key: Column with the labels.
        img_size: Height and width in pixels, None for the model's.
        in_chans: Number of image channels.
        input_size: Channels, height and width.
        crop_pct: Share of the image in the evaluation crop.
        mean: Channel means.
        std: Channel standard deviations.
        interpolation: How images are resized, empty for the model's way.
        batch_size: Images per batch and process.
        workers: Loader processes.
        max_bad_samples: Number of unreadable images that are left out before it is an error.
        pin_mem: Whether batches are in pinned memory, None for with a GPU only.
    """

    data_dir: Optional[str] = None
    dataset: str = ''
    dataset_download: bool = False
    dataset_trust_remote_code: bool = False
    class_map: str = ''
    input_img_mode: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    img_size: Optional[int] = None
    in_chans: Optional[int] = None
    input_size: Optional[List[int]] = None
    crop_pct: Optional[float] = None
    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    interpolation: str = ''
    batch_size: int = 128
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    max_bad_samples: int = 0
    pin_mem: Optional[bool] = None

    def __post_init__(self) -> None:
        if self.input_size and self.in_chans is None:
            self.in_chans = self.input_size[0]


@dataclass
class TrainDataConfig(DataConfig):
    """`DataConfig` with what only a training needs.

    Attributes:
        train_split: Split to train on.
        cache_dataset: ``device`` keeps small images decoded on the training device.
        train_num_samples: Number of samples in a stream of unknown length.
        epoch_repeats: Passes per epoch over a stream.
        val_split: Split that chooses the best epoch, None to hold images out of the train split.
        val_fraction: Share of the train split that is held out.
        val_seed: Seed of that choice.
        validation_batch_size: Images per batch of the evaluation, None for `batch_size`.
    """

    train_split: str = 'train'
    cache_dataset: str = ''
    train_num_samples: Optional[int] = None
    epoch_repeats: float = 0.0
    val_split: Optional[str] = None
    val_fraction: float = 0.1
    val_seed: int = 0
    validation_batch_size: Optional[int] = None

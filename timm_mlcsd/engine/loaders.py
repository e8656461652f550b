"""Batches from data sets, through timm's loaders."""

import copy
import logging
import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any, Callable, Dict, List, Optional, Union

import torch
import torch.distributed as dist
from timm.data import Mixup, create_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from .._timm import fast_collate
from ..data import (
    CachedLoader,
    CheckedCollate,
    CheckedLoader,
    CheckedMixup,
    DropBroken,
    PadCrop,
    RecordingSampler,
    SubstituteBroken,
    TransformSubset,
    cache_images,
    check_labels,
    checked_images,
)
from ..distributed import SINGLE_PROCESS, DistributedContext
from ..errors import UserError, as_user_error
from .data_config import DataConfig, TrainDataConfig
from .datasets import num_images

__all__ = ['AugmentConfig', 'eval_loader', 'mixup_active', 'set_epoch', 'train_loader']

_logger = logging.getLogger(__name__)


@dataclass
class AugmentConfig:
    """Augmentation of the training images, as in timm.

    Attributes:
        no_aug: Whether all augmentation is off.
        train_crop_mode: ``rrc``, ``rkrc``, ``rkrr`` or ``pad4``, None for timm's default.
        scale: Smallest and largest share of the image in a random resized crop.
        ratio: Smallest and largest ratio of its sides.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of colour jitter.
        color_jitter_prob: Probability of colour jitter, None for always.
        grayscale_prob: Probability of greyscale.
        gaussian_blur_prob: Probability of blur.
        aa: AutoAugment policy.
        reprob: Probability of random erasing.
        remode: What erased pixels become: ``const``, ``rand`` or ``pixel``.
        recount: Number of erased rectangles.
        train_interpolation: How training images are resized.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        cutmix_minmax: Smallest and largest share of cutmix, instead of alpha.
        mixup_prob: Probability of mixing a batch.
        mixup_switch_prob: Probability of cutmix where both are on.
        mixup_mode: ``batch``, ``pair`` or ``elem``.
        mixup_off_epoch: Epoch from which mixing is off, 0 for never.
    """

    no_aug: bool = False
    train_crop_mode: Optional[str] = None
    scale: List[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: List[float] = field(default_factory=lambda: [3.0 / 4.0, 4.0 / 3.0])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    color_jitter_prob: Optional[float] = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    aa: Optional[str] = None
    reprob: float = 0.0
    remode: str = 'pixel'
    recount: int = 1
    train_interpolation: str = 'random'
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: Optional[List[float]] = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = 'batch'
    mixup_off_epoch: int = 0


def mixup_active(augment: AugmentConfig) -> bool:
    """Whether batches are mixed, so that targets are soft."""
    return augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None


def train_loader(
    config: TrainDataConfig,
    augment: AugmentConfig,
    dataset: Dataset[Any],
    data_config: Dict[str, Any],
    num_classes: int,
    device: torch.device,
    *,
    smoothing: float = 0.0,
    seed: int = 42,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Batches to train on: augmented and normalised, on the device.

    Args:
        config: Batch size, workers and cache.
        augment: Augmentation.
        dataset: Training images.
        data_config: Preprocessing.
        num_classes: C, of soft targets.
        device: Device of the batches.
        smoothing: Label smoothing of mixed targets.
        seed: Seed of the order that processes share.
        channels_last: Memory format of cached images.
        dtype: Data type of cached images, that of autocast say.

    Raises:
        UserError: The settings do not go together.
    """
    if config.cache_dataset:
        _check_cacheable(config, augment, dataset)
    if checked_images(dataset) is not None and not isinstance(dataset, IterableDataset):
        dataset = SubstituteBroken(dataset)
    mixup = _make_mixup(config, augment, num_classes, smoothing) if mixup_active(augment) else None
    collate = CheckedCollate(fast_collate, num_classes) if mixup is None or config.cache_dataset else mixup
    loader = _augmented_loader(config, augment, dataset, data_config, device, collate)
    _prepare_workers(loader.loader)
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.seed = seed
    drawn = _remember(loader.loader)
    pad_and_crop = PadCrop(data_config['input_size'][1:])
    if config.cache_dataset:
        loader = _cached_and_augmented(
            config, augment, loader, num_classes, pad_and_crop, channels_last=channels_last, mixup=mixup, dtype=dtype
        )
        drawn = loader.batch
    elif augment.train_crop_mode == 'pad4' and not augment.no_aug:
        # the first of timm's training transforms is its crop
        loader.loader.dataset.transform.transforms[0] = pad_and_crop
    if len(loader) == 0:
        raise UserError(
            f'--batch-size {config.batch_size} is larger than the training set ({num_images(dataset)} images).'
        )
    # worker processes and cached images have generators of their own
    in_process = mixup is not None if config.cache_dataset else config.workers == 0
    return CheckedLoader(loader, dataset, drawn, draws_per_batch=in_process or augment.reprob > 0)


def _make_mixup(config: TrainDataConfig, augment: AugmentConfig, num_classes: int, smoothing: float) -> Mixup:
    """The function that mixes batches; for cached images it mixes them on the device."""
    if config.batch_size % 2:
        raise UserError(f'--batch-size {config.batch_size} must be even: mixup and cutmix work on pairs of images.')
    return (Mixup if config.cache_dataset else CheckedMixup)(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=augment.cutmix_minmax,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def _augmented_loader(
    config: TrainDataConfig,
    augment: AugmentConfig,
    dataset: Dataset[Any],
    data_config: Dict[str, Any],
    device: torch.device,
    collate: Union[CheckedCollate, Mixup],
) -> Any:
    """timm's loader of training batches."""
    pad_crop = augment.train_crop_mode == 'pad4'
    return create_loader(
        dataset,  # type: ignore[arg-type]  # timm takes any data set with a transform
        input_size=data_config['input_size'],
        batch_size=config.batch_size,
        is_training=True,
        no_aug=augment.no_aug,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        re_count=augment.recount,
        train_crop_mode=None if pad_crop else augment.train_crop_mode,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        color_jitter_prob=augment.color_jitter_prob,
        grayscale_prob=augment.grayscale_prob,
        gaussian_blur_prob=augment.gaussian_blur_prob,
        auto_augment=augment.aa,
        interpolation=augment.train_interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=_pin_memory(config, device),
        device=device,
        distributed=dist.is_initialized(),
        # fresh workers take their seeds from the epoch's, so that a resumed epoch sees the same images
        persistent_workers=False,
    )


def set_epoch(batches: Any, dataset: Dataset[Any], epoch: int) -> None:
    """Tell streams and distributed samplers the number of the epoch."""
    for it in (dataset, getattr(batches, 'sampler', None)):
        if it is not None and hasattr(it, 'set_epoch'):
            it.set_epoch(epoch)


def eval_loader(
    config: DataConfig,
    dataset: Dataset[Any],
    data_config: Dict[str, Any],
    device: torch.device,
    *,
    batch_size: Optional[int] = None,
    dist_context: DistributedContext = SINGLE_PROCESS,
    num_classes: Optional[int] = None,
    channels_last: bool = False,
) -> Any:
    """Batches to evaluate on: resized, centre-cropped and normalised, on the device.

    With several processes each gets its share, so that all together see every image once. Labels must be of
    `num_classes` classes, if that is given.
    """
    # timm sets the transform of the data set; loaders of other networks have others
    dataset = copy.copy(dataset)
    shard = (0, 1)
    if isinstance(dataset, IterableDataset):
        shard = (dist_context.rank, dist_context.size)
    elif dist_context.size > 1:
        dataset = TransformSubset(dataset, range(dist_context.rank, num_images(dataset), dist_context.size))
    collate = fast_collate if num_classes is None else CheckedCollate(fast_collate, num_classes)
    loader = create_loader(
        dataset,  # type: ignore[arg-type]  # timm takes any data set with a transform
        input_size=data_config['input_size'],
        batch_size=batch_size or config.batch_size,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=config.workers,
        collate_fn=DropBroken(collate, data_config['input_size'][0]),
        pin_memory=_pin_memory(config, device),
        device=device,
        persistent_workers=False,
    )
    _prepare_workers(loader.loader)
    if getattr(config, 'cache_dataset', ''):
        loader = _cached(config, loader, num_classes, channels_last=channels_last)
    return CheckedLoader(loader, dataset, shard=shard)


def _pin_memory(config: DataConfig, device: torch.device) -> bool:
    # copies from pageable memory synchronise with the GPU
    return device.type == 'cuda' if config.pin_mem is None else config.pin_mem


def _prepare_workers(loader: DataLoader[Any]) -> None:
    """Prepare the start of a loader's processes."""
    if not loader.num_workers:
        return
    if os.name == 'posix':
        # its start would undo the signal mask of `CheckedLoader`
        resource_tracker.ensure_running()
    # before Python 3.12 a fork hangs for ever if a thread of torch.distributed enters Python at that moment
    forks = sys.version_info < (3, 12) and multiprocessing.get_start_method() == 'fork'
    if forks and dist.is_initialized() and not isinstance(loader.dataset, IterableDataset):
        multiprocessing.set_forkserver_preload([__name__])
        loader.multiprocessing_context = 'forkserver'


def _remember(loader: DataLoader[Any]) -> Optional[Callable[[int], List[int]]]:
    """Let a loader record the indices of its batches; None for a stream, which has none."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    # timm gives a batch size, and no sampler of batches
    assert isinstance(batches, BatchSampler) and isinstance(batches.sampler, Sampler)
    sampler = batches.sampler = RecordingSampler(batches.sampler)
    return lambda number: sampler.batch(number, batches.batch_size)


def _check_cacheable(config: DataConfig, augment: AugmentConfig, dataset: Dataset[Any]) -> None:
    """Refuse settings that ``--cache-dataset device`` does not support."""
    if isinstance(dataset, IterableDataset):
        raise UserError(f'--cache-dataset device: --dataset {config.dataset!r} is a stream, which cannot be kept.')
    strengths = dict(
        color_jitter=augment.color_jitter,
        aa=augment.aa,
        grayscale_prob=augment.grayscale_prob,
        gaussian_blur_prob=augment.gaussian_blur_prob,
    )
    undone = [f'--{name.replace("_", "-")} {value}' for name, value in strengths.items() if value]
    if augment.train_crop_mode != 'pad4':
        undone.append(f'--train-crop-mode {augment.train_crop_mode or "rrc"}')
    if undone and not augment.no_aug:
        raise UserError(
            f'--cache-dataset device crops as --train-crop-mode pad4 does, flips, erases and mixes; it does no '
            f'{", ".join(undone)} (--color-jitter 0 leaves that out).'
        )


def _cached_and_augmented(
    config: DataConfig, augment: AugmentConfig, loader: Any, num_classes: int, pad_and_crop: PadCrop, **kwargs: Any
) -> CachedLoader:
    """A loader of training batches from images kept on the device."""
    augmented = not augment.no_aug
    if augmented:
        loader.loader.dataset.transform = pad_and_crop.resize
    return _cached(
        config,
        loader,
        num_classes,
        training=True,
        padding=pad_and_crop.padding * augmented,
        hflip=augment.hflip * augmented,
        vflip=augment.vflip * augmented,
        sampler=loader.sampler if dist.is_initialized() else None,
        **kwargs,
    )


def _cached(config: DataConfig, loader: Any, num_classes: Optional[int], **kwargs: Any) -> CachedLoader:
    """A loader of the same batches as timm's, from images kept on the device."""
    with as_user_error('--cache-dataset device'):
        try:
            images, targets = cache_images(loader.loader.dataset, loader.device, config.workers)
        except Exception:
            checked = checked_images(loader.loader.dataset)
            if checked is not None:
                checked.check()
            raise
        if num_classes is not None:
            check_labels(targets.reshape(len(targets), -1)[:, 0].tolist(), num_classes)
    _logger.info(f'Keeping {len(images)} images on {loader.device}: {images.numel() / 1e6:.0f} MB')
    return CachedLoader(
        images,
        targets,
        loader.loader.batch_size,
        mean=loader.mean.flatten().double() / 255,
        std=loader.std.flatten().double() / 255,
        erase=loader.random_erasing,
        **kwargs,
    )

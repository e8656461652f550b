"""From data sets and flags to batches, through timm's loaders."""

import argparse
import logging
import multiprocessing
import os
import sys
from multiprocessing import resource_tracker
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as dist
from timm.data import Mixup, create_loader
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..data import (
    CachedLoader,
    CheckedCollate,
    CheckedLoader,
    CheckedMixup,
    NextIfBroken,
    PadCrop,
    RememberingSampler,
    TransformSubset,
    WithoutBroken,
    cache_images,
    check_labels,
    checked_images,
)
from ..errors import UserError, blame
from .world import ALONE, World

__all__ = ['eval_loader', 'mixup_active', 'set_epoch', 'train_loader']

_logger = logging.getLogger(__name__)


def mixup_active(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def train_loader(
    args: argparse.Namespace,
    dataset: Dataset,
    data_config: Dict[str, Any],
    num_classes: int,
    device: torch.device,
) -> Any:
    """Batches to train on: augmented, normalised, on the device."""
    for flag, (low, high) in (('--scale', args.scale), ('--ratio', args.ratio)):
        if not 0 < low <= high:
            raise UserError(f'{flag} {low} {high}: the first must be above 0, and the second no smaller.')
    if args.cache_dataset:
        _check_cacheable(args, dataset)
    if checked_images(dataset) is not None and not isinstance(dataset, IterableDataset):
        dataset = NextIfBroken(dataset)
    mixup = None
    if mixup_active(args):
        if args.batch_size % 2:
            raise UserError(f'--batch-size {args.batch_size} must be even: mixup and cutmix work on pairs of images.')
        mixup = (Mixup if args.cache_dataset else CheckedMixup)(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    pad_crop = args.train_crop_mode == 'pad4'
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=None if pad_crop else args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        collate_fn=CheckedCollate(fast_collate, num_classes) if mixup is None or args.cache_dataset else mixup,
        pin_memory=_pin_memory(args, device),
        device=device,
        distributed=dist.is_initialized(),
        # fresh workers take their seeds from the epoch's, so that a resumed epoch sees the same images
        persistent_workers=False,
    )
    _prepare_workers(loader.loader)
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.seed = args.seed
    drawn = _remember(loader.loader)
    pad_and_crop = PadCrop(data_config['input_size'][1:])
    if args.cache_dataset:
        augmented = not args.no_aug
        if augmented:
            dataset.transform = pad_and_crop.resize
        loader = _cached(
            args,
            loader,
            num_classes,
            training=True,
            padding=pad_and_crop.padding * augmented,
            hflip=args.hflip * augmented,
            vflip=args.vflip * augmented,
            mixup=mixup,
            sampler=loader.sampler if dist.is_initialized() else None,
        )
        drawn = loader.batch
    elif pad_crop and not args.no_aug:
        # the first of timm's training transforms is its crop
        dataset.transform.transforms[0] = pad_and_crop
    if len(loader) == 0:
        raise UserError(f'--batch-size {args.batch_size} is larger than the training set ({len(dataset)} images).')
    return CheckedLoader(loader, dataset, drawn)


def set_epoch(batches: Any, dataset: Dataset, epoch: int) -> None:
    """Tell streams, and what shares the images out among processes, that another epoch begins."""
    for it in (dataset, getattr(batches, 'sampler', None)):
        if hasattr(it, 'set_epoch'):
            it.set_epoch(epoch)


def eval_loader(
    args: argparse.Namespace,
    dataset: Dataset,
    data_config: Dict[str, Any],
    device: torch.device,
    batch_size: Optional[int] = None,
    world: World = ALONE,
    num_classes: Optional[int] = None,
) -> Any:
    """Batches to evaluate on: resized and centre-cropped, normalised, on the device; in `world`, this process's part of
    them, so that all together see every image once. Labels must be of `num_classes` classes, if that is given."""
    part = (0, 1)
    if isinstance(dataset, IterableDataset):
        part = (world.rank, world.size)
    elif world.size > 1:
        dataset = TransformSubset(dataset, range(world.rank, len(dataset), world.size))
    collate = fast_collate if num_classes is None else CheckedCollate(fast_collate, num_classes)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=args.workers,
        collate_fn=WithoutBroken(collate, data_config['input_size'][0]),
        pin_memory=_pin_memory(args, device),
        device=device,
        persistent_workers=False,
    )
    _prepare_workers(loader.loader)
    loader = _cached(args, loader, num_classes) if getattr(args, 'cache_dataset', '') else loader
    return CheckedLoader(loader, dataset, part=part)


def _pin_memory(args: argparse.Namespace, device: torch.device) -> bool:
    # from other memory a copy waits for all that the GPU has yet to do
    return device.type == 'cuda' if args.pin_mem is None else args.pin_mem


def _prepare_workers(loader: DataLoader) -> None:
    """Make a loader's processes start without accidents."""
    if not loader.num_workers:
        return
    if os.name == 'posix':
        # while it starts it would lift what `CheckedLoader` does about signals
        resource_tracker.ensure_running()
    # before Python 3.12 a fork hangs for ever if a thread of torch.distributed enters Python at that moment
    forks = sys.version_info < (3, 12) and multiprocessing.get_start_method() == 'fork'
    if forks and dist.is_initialized() and not isinstance(loader.dataset, IterableDataset):
        multiprocessing.set_forkserver_preload([__name__])
        loader.multiprocessing_context = 'forkserver'


def _remember(loader: DataLoader) -> Optional[Callable[[int], List[int]]]:
    """Make a loader remember its batches' indices; a stream has none."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    sampler = loader.batch_sampler.sampler = RememberingSampler(loader.batch_sampler.sampler)
    return lambda number: sampler.batch(number, loader.batch_size)


def _check_cacheable(args: argparse.Namespace, dataset: Dataset) -> None:
    """Refuse what ``--cache-dataset device`` does not do."""
    if isinstance(dataset, IterableDataset):
        raise UserError(f'--cache-dataset device: --dataset {args.dataset!r} is a stream, which cannot be kept.')
    undone = dict(
        color_jitter=args.color_jitter,
        aa=args.aa,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
    )
    undone = [f'--{name.replace("_", "-")} {value}' for name, value in undone.items() if value]
    if args.train_crop_mode != 'pad4':
        undone.append(f'--train-crop-mode {args.train_crop_mode or "rrc"}')
    if undone and not args.no_aug:
        raise UserError(
            f'--cache-dataset device crops as --train-crop-mode pad4 does, flips, erases and mixes; it does no '
            f'{", ".join(undone)} (--color-jitter 0 leaves that out).'
        )


def _cached(args: argparse.Namespace, loader: Any, num_classes: Optional[int], **kwargs: Any) -> CachedLoader:
    """The loader that gives what timm's would, from images kept on the device."""
    with blame('--cache-dataset device'):
        try:
            images, targets = cache_images(loader.loader.dataset, loader.device, args.workers)
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
        channels_last=args.channels_last,
        **kwargs,
    )

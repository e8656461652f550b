"""From flags to data sets and loaders, all through timm."""

import argparse
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.loader import fast_collate
from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from ..data import (
    CachedLoader,
    CheckedImages,
    CheckedLoader,
    ConvertedImages,
    DigitsDataset,
    NextIfBroken,
    PadCrop,
    TransformSubset,
    cache_images,
    checked_images,
    hold_out,
    without_broken,
)
from ..errors import UserError, blame
from .world import World

__all__ = [
    'check_classes',
    'class_names',
    'eval_loader',
    'held_out',
    'is_trained_on',
    'load_dataset',
    'mixup_active',
    'same_split',
    'set_epoch',
    'shard',
    'train_and_val_datasets',
    'train_loader',
]

_logger = logging.getLogger(__name__)

_PREFIXES = ('', 'hfds', 'hfids', 'tfds', 'torch', 'wds')
_TRAIN_AND_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')
# what timm takes for one another, then what else tells that a folder holds splits
_SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'), ('test',))


def load_dataset(
    args: argparse.Namespace,
    split: str,
    is_training: bool = False,
    num_samples: Optional[int] = None,
    needs_folder: bool = False,
) -> Dataset:
    """Load one split of what ``--dataset`` and ``--data-dir`` name.

    Args:
        args: The flags.
        split: Which.
        is_training: Whether streamed data is shuffled.
        num_samples: Length of streamed data.
        needs_folder: Whether a folder without splits is a mistake, instead of being the split itself.

    Raises:
        UserError: It cannot be read.
    """
    image_mode = args.input_img_mode or ('L' if args.in_chans == 1 else 'RGB')
    if args.dataset == 'digits':
        with blame('--dataset digits'):
            return DigitsDataset(split, image_mode=image_mode)
    if not args.dataset and not args.data_dir:
        tag = getattr(args, 'pretrained_backbone', None)
        swallowed = f' --pretrained-backbone took {tag!r} for a tag.' if isinstance(tag, str) else ''
        raise UserError(f'no data: give a path (./train.py DIR), or --dataset digits, which needs none.{swallowed}')
    prefix, _, name = args.dataset.partition('/')
    if prefix.lower() not in _PREFIXES:  # timm would take it for a folder of images
        raise UserError(
            f'--dataset {args.dataset!r} is unknown: leave it out for a folder of images, or give digits or a name '
            f'that begins with {", ".join(p + "/" for p in _PREFIXES if p)}.'
        )
    prefix = prefix.lower()
    if prefix == 'torch':
        _check_torchvision_has_split(name, args.data_dir, split)
    path = args.data_dir if prefix in ('', 'torch') else name
    looks_local = path == args.data_dir or path.startswith(('/', './', '../'))
    if path and looks_local and not args.dataset_download and not Path(path).exists():
        raise UserError(f'no data at {path!r}: there is no such file or folder.')
    if prefix == '' or name in ('folder', 'image_folder'):
        _check_folder_has_split(args.data_dir, split, needs_folder)
    if prefix in ('hfds', 'hfids') and importlib.util.find_spec('datasets') is None:
        raise UserError(f'--dataset {args.dataset} needs the package datasets: pip install "timm_mlcsd[hfds]".')
    keys = dict(input_key=args.input_key, target_key=args.target_key) if prefix not in ('', 'torch') else {}
    with blame(f'split {split!r} of --dataset {args.dataset!r} at {args.data_dir!r} cannot be read'):
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=num_samples,
            repeats=args.epoch_repeats if is_training else 0,
            seed=getattr(args, 'seed', 42),
            input_img_mode=image_mode,
            trust_remote_code=args.dataset_trust_remote_code,
            **keys,
        )
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset.reader, image_mode, args.max_bad_samples)
    # timm leaves torchvision's images as they are
    return ConvertedImages(dataset, image_mode) if prefix == 'torch' else dataset


def _check_folder_has_split(root: str, split: str, needs_folder: bool) -> None:
    """Refuse a split that a folder of splits doesn't have; timm would take all its images, whatever their split."""
    folders = {p.name for p in Path(root).iterdir() if p.is_dir()} if Path(root).is_dir() else set()
    accepted = next((names for names in _SPLIT_FOLDERS if split in names), (split,))
    known = {name for names in _SPLIT_FOLDERS for name in names}
    if not folders.intersection(accepted) and (needs_folder or folders & known):
        if folders & known:
            raise UserError(f'{root!r} has no split {split!r}; it has {", ".join(sorted(folders))}.')
        raise UserError(
            f'{root!r} is not divided into splits: as split {split!r} it would give the images that are trained on. '
            f'Leave --val-split out, or validate with --held-out.'
        )


def _check_torchvision_has_split(name: str, root: Optional[str], split: str) -> None:
    """Refuse what timm would take for the test images: with these data sets, any split that isn't train."""
    if not root:
        raise UserError(f'--dataset torch/{name} needs a path: ./train.py DIR, or --data-dir DIR.')
    if name.rpartition('/')[2].lower() in _TRAIN_AND_TEST and split not in ('train', 'training', 'test'):
        raise UserError(
            f'torch/{name} has no split {split!r}, only train and test. Leave --val-split out to hold images out of '
            f'train; name test to evaluate.'
        )


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """The names of the classes in the order of their indices, None where the data set doesn't tell."""
    while isinstance(dataset, (TransformSubset, ConvertedImages)):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', dataset)
    # timm's reader of tar files has another name for it
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if mapping:
        return [str(name) for name in sorted(mapping, key=mapping.get)]
    names = getattr(reader, 'classes', None)
    return [str(name) for name in names] if names is not None else None


def check_classes(names: Optional[List[str]], expected: Optional[List[str]], what: str) -> None:
    """Refuse data whose classes have other names, and so other indices, than those trained on."""
    if names and expected and names != expected:
        raise UserError(
            f'the classes of {what} ({", ".join(names[:5])}, ...) are not those that are trained on '
            f'({", ".join(expected[:5])}, ...); --class-map FILE gives classes their indices.'
        )


def train_and_val_datasets(args: argparse.Namespace) -> Tuple[Dataset, Dataset, Dict[str, Any]]:
    """The data to train on, the data that chooses the best epoch, and a record of which was which.

    Without ``--val-split`` the second is held out of the train split by a seed of its own; the record then holds the
    indices, so that nobody ever calibrates on images that were trained on.
    """
    train = load_dataset(args, args.train_split, is_training=True, num_samples=args.train_num_samples)
    record = dict(train_split=args.train_split, val_split=args.val_split)
    if args.val_split:
        # without a folder for it, timm would take the training images once more
        val = load_dataset(args, args.val_split, num_samples=args.val_num_samples, needs_folder=True)
        check_classes(class_names(val), class_names(train), f'split {args.val_split!r}')
        return train, val, record
    if isinstance(train, IterableDataset):
        raise UserError(f'--dataset {args.dataset!r} is a stream, nothing can be held out of it: name a --val-split.')
    if not 0.0 < args.val_fraction < 1.0:
        raise UserError(
            f'--val-fraction {args.val_fraction} must lie between 0 and 1: the held-out part chooses the best epoch. '
            f'To train on the whole split, name a --val-split.'
        )
    kept, held = hold_out(len(train), args.val_fraction, args.val_seed)
    record.update(
        val_fraction=args.val_fraction, val_seed=args.val_seed, val_indices=torch.tensor(held), train_size=len(train)
    )
    return TransformSubset(train, kept), TransformSubset(train, held), record


def held_out(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> Tuple[Dataset, str]:
    """The images that training held out of its train split, and what to call them.

    Raises:
        UserError: The split isn't the one of training.
    """
    split = checkpoint['train_split']
    dataset = load_dataset(args, split)
    if len(dataset) != checkpoint['train_size']:
        size = checkpoint['train_size']
        raise UserError(f'the held-out images: split {split!r} has {len(dataset)} images, not the {size} of training.')
    return TransformSubset(dataset, checkpoint['val_indices'].tolist()), f'the held-out part of {split}'


def same_split(split: str, other: str) -> bool:
    """Whether two names stand for the same images, or for some of the same: timm's synonyms, parts of one split."""

    def whole(split: str) -> str:
        name = split.partition('[')[0].lower()
        return next((names[0] for names in _SPLIT_FOLDERS if name in names), name)

    return whole(split) == whole(other)


def is_trained_on(args: argparse.Namespace, checkpoint: Dict[str, Any], split: str) -> bool:
    """Whether a split of the data that the flags name is, as far as a checkpoint tells, what it was trained on."""
    if 'train_split' not in checkpoint or not same_split(split, checkpoint['train_split']):
        return False
    trained = checkpoint.get('args', {})
    same_set = args.dataset.lower() == (trained.get('dataset') or '').lower()
    return same_set and os.path.realpath(args.data_dir or '') == os.path.realpath(trained.get('data_dir') or '')


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
    if args.cache_dataset:
        _check_cacheable(args, dataset)
    if checked_images(dataset) is not None:
        dataset = NextIfBroken(dataset)
    mixup = None
    if mixup_active(args):
        if args.batch_size % 2:
            raise UserError(f'--batch-size {args.batch_size} must be even: mixup and cutmix work on pairs of images.')
        mixup = (Mixup if args.cache_dataset else FastCollateMixup)(
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
        collate_fn=None if args.cache_dataset else mixup,
        pin_memory=args.pin_mem,
        device=device,
        distributed=dist.is_initialized(),
        # fresh workers take their seeds from the epoch's, so that a resumed epoch sees the same images
        persistent_workers=False,
    )
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.seed = args.seed
    pad_and_crop = PadCrop(data_config['input_size'][1:])
    if args.cache_dataset:
        augmented = not args.no_aug
        if augmented:
            dataset.transform = pad_and_crop.resize
        loader = _cached(
            args,
            loader,
            training=True,
            padding=pad_and_crop.padding * augmented,
            hflip=args.hflip * augmented,
            vflip=args.vflip * augmented,
            mixup=mixup,
            sampler=loader.sampler if dist.is_initialized() else None,
        )
    elif pad_crop and not args.no_aug:
        # the first of timm's training transforms is its crop
        dataset.transform.transforms[0] = pad_and_crop
    if len(loader) == 0:
        raise UserError(f'--batch-size {args.batch_size} is larger than the training set ({len(dataset)} images).')
    return _checked(loader, dataset)


def set_epoch(batches: Any, dataset: Dataset, epoch: int) -> None:
    """Tell streams, and what shares the images out among processes, that another epoch begins."""
    for it in (dataset, getattr(batches, 'sampler', None)):
        if hasattr(it, 'set_epoch'):
            it.set_epoch(epoch)


def shard(dataset: Dataset, world: World) -> Dataset:
    """This process's part of what all evaluate on: every image once. A stream parts itself."""
    if world.size == 1 or isinstance(dataset, IterableDataset):
        return dataset
    return TransformSubset(dataset, range(world.rank, len(dataset), world.size))


def eval_loader(
    args: argparse.Namespace,
    dataset: Dataset,
    data_config: Dict[str, Any],
    device: torch.device,
    batch_size: Optional[int] = None,
) -> Any:
    """Batches to evaluate on: resized and centre-cropped, normalised, on the device."""
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
        collate_fn=without_broken(fast_collate),
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,
    )
    return _checked(_cached(args, loader) if getattr(args, 'cache_dataset', '') else loader, dataset)


def _checked(loader: Any, dataset: Dataset) -> Any:
    """The loader, stopping where too many images are broken."""
    return CheckedLoader(loader, checked_images(dataset))


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


def _cached(args: argparse.Namespace, loader: Any, **kwargs: Any) -> CachedLoader:
    """The loader that gives what timm's would, from images kept on the device."""
    with blame('--cache-dataset device'):
        images, targets = cache_images(loader.loader.dataset, loader.device, args.workers)
    _logger.info(f'Keeping {len(images)} images on {loader.device}: {images.numel() / 1e6:.0f} MB')
    return CachedLoader(
        images,
        targets,
        loader.loader.batch_size,
        mean=loader.mean.flatten() / 255,
        std=loader.std.flatten() / 255,
        erase=loader.random_erasing,
        channels_last=args.channels_last,
        **kwargs,
    )

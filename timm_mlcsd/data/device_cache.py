"""Small images kept on the training device: decoded once, cropped, flipped and normalised there, a batch at a time."""

from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

__all__ = ['CachedLoader', 'cache_images']


def cache_images(dataset: Dataset, device: torch.device, workers: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    """Decode a whole data set.

    Args:
        dataset: Gives (image, target), images of one size: PIL's, or uint8 tensors [C, H, W]; None is left out.
        device: Where they go.
        workers: Processes that decode.

    Returns:
        Images, uint8 [N, H, W, C], and targets [N, ...].
    """
    batches = DataLoader(dataset, batch_size=256, num_workers=workers, collate_fn=_collate)
    images, targets = (torch.cat(parts) for parts in zip(*(batch for batch in batches if batch is not None)))
    return images.to(device), targets.to(device)


def _collate(samples: Sequence[Tuple[Any, Any]]) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return None
    images, targets = zip(*samples)
    return torch.stack([_as_hwc(image) for image in images]), default_collate(list(targets))


def _as_hwc(image: Any) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image.permute(1, 2, 0)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[..., None] if pixels.ndim == 2 else pixels


class CachedLoader:
    """Batches [B, C, H, W] from images on the device.

    To train, it does what `PadCrop` and timm's flips do image by image, drawing an offset and a flip for every image
    of the batch at once: the same distribution, other random numbers. Its only state are the default random generators:
    PyTorch's, for mixing NumPy's and for erasing Python's too.

    Args:
        images: uint8 [N, H, W, C].
        targets: [N, ...].
        batch_size: B.
        mean: [C], of values from 0 to 1.
        std: [C], likewise.
        training: Shuffle, and drop the last batch if it isn't full.
        padding: Black pixels at every side before a random crop to the old size; 0 for no crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        erase: timm's ``RandomErasing``, on normalised batches.
        mixup: timm's ``Mixup``, on batches and targets.
        channels_last: Leave the batches in that memory order, which the images are kept in.
        sampler: Which images come in which order, instead of all.
    """

    def __init__(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        mean: torch.Tensor,
        std: torch.Tensor,
        training: bool = False,
        padding: int = 0,
        hflip: float = 0.0,
        vflip: float = 0.0,
        erase: Optional[Callable] = None,
        mixup: Optional[Callable] = None,
        channels_last: bool = False,
        sampler: Optional[Sampler] = None,
    ):
        self.size = images.shape[1:3]
        self.images = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        self.targets = targets
        self.batch_size = batch_size
        # in float64, or the rounding would be another than that of timm's loaders
        self.mean, self.std = ((255 * v.double()).float().to(images.device) for v in (mean, std))
        self.training = training
        self.padding = padding
        self.hflip = hflip
        self.vflip = vflip
        self.erase = erase
        self.mixup = mixup
        self.channels_last = channels_last
        self.sampler = sampler
        self.order = torch.empty(0, dtype=torch.long)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed; switched off, targets keep the form that mixing gives them, as in timm."""
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled

    def __len__(self) -> int:
        whole, rest = divmod(len(self.targets if self.sampler is None else self.sampler), self.batch_size)
        return whole + bool(rest and not self.training)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        device = self.images.device
        if self.sampler is not None:
            order = torch.tensor(list(self.sampler), device=device)
        elif self.training:
            order = torch.randperm(len(self.targets), device=device)
        else:
            order = torch.arange(len(self.targets), device=device)
        self.order = order
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            images = self._crop(chosen) if self.padding or self.hflip or self.vflip else self.images[chosen]
            images = images.float().sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
            images = images if self.channels_last else images.contiguous()
            targets = self.targets[chosen]
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            if self.erase is not None:
                images = self.erase(images)
            yield images, targets

    def batch(self, number: int) -> List[int]:
        """Which images are in the batch of that number of this epoch."""
        return self.order[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    def _crop(self, chosen: torch.Tensor) -> torch.Tensor:
        """Every chosen image, cropped and flipped on its own."""
        rows, cols = (
            self._lines(len(chosen), length, flip) for length, flip in zip(self.size, (self.vflip, self.hflip))
        )
        return self.images[chosen[:, None, None], rows[:, :, None], cols[:, None, :]]

    def _lines(self, count: int, length: int, flip: float) -> torch.Tensor:
        """Which rows, or columns, of the padded images to take: [count, length]."""
        device = self.images.device
        lines = torch.arange(length, device=device).expand(count, -1)
        if flip:
            lines = torch.where(torch.rand(count, 1, device=device) < flip, length - 1 - lines, lines)
        return lines + torch.randint(2 * self.padding + 1, (count, 1), device=device)

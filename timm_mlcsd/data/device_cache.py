"""Cache small images on the training device, and crop, flip and normalise them there, batch by batch."""

from typing import Any, Callable, Iterator, List, Optional, Sequence, Sized, Tuple

import numpy as np
import torch
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

__all__ = ['CachedLoader', 'cache_images']


def cache_images(dataset: Dataset[Any], device: torch.device, workers: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    """Decode all images of a data set.

    Args:
        dataset: Data set of (image, target) with images of one size, PIL images or uint8 tensors [C, H, W]; samples
            that are None are left out.
        device: Device of the cache.
        workers: Number of processes that decode; default 0 for the calling process.

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
    """Loader of batches [B, C, H, W] from images on the device.

    In training it augments as `PadCrop` and timm's flips do, but draws the offsets and flips of all images of a batch
    at once. The distribution is the same, the random numbers differ: they come from a generator of the loader's own,
    which PyTorch's default generator seeds at the start of an epoch. `mixup` and `erase` draw from default generators.

    Args:
        images: Images, uint8 [N, H, W, C].
        targets: Targets, [N, ...].
        batch_size: Number of images B in a batch.
        mean: Mean per channel of pixel values scaled to 0 to 1, [C].
        std: Standard deviation per channel of pixel values scaled to 0 to 1, [C].
        training: Whether to shuffle, and to drop the last batch if it is not full; default False.
        padding: Black pixels added at every side before a random crop to the original size; default 0 for no crop.
        hflip: Probability of a horizontal flip; default 0.
        vflip: Probability of a vertical flip; default 0.
        erase: timm's ``RandomErasing`` for normalised batches; default None.
        mixup: timm's ``Mixup`` for batches and targets; default None.
        channels_last: Whether batches stay in the channels-last memory format of the cache; default False.
        sampler: Indices of the images in the order of an epoch; default all images.
        dtype: Data type of training batches; default float32, which `mixup` and `erase` need.
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
        erase: Optional[Callable[..., Any]] = None,
        mixup: Optional[Mixup] = None,
        channels_last: bool = False,
        sampler: Optional[Sampler[int]] = None,
        dtype: torch.dtype = torch.float32,
    ):
        device = images.device
        self.size = images.shape[1:3]
        self.images = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        self.targets = targets
        self.batch_size = batch_size
        # computed in float64, to round as timm's loaders do
        self.mean, self.std = ((255 * v.double()).float().to(device) for v in (mean, std))
        self.factor, self.summand = 1 / self.std, -self.mean / self.std
        self.training = training
        self.padding = padding
        # rows, then columns
        self.flips = vflip, hflip
        self.lines = [torch.arange(length, device=device) for length in self.size]
        self.flipped_lines = [lines.flip(0) for lines in self.lines]
        self.generator = torch.Generator(device)
        self.erase = erase
        self.mixup = mixup
        self.channels_last = channels_last
        self.sampler = sampler
        self.dtype = dtype if mixup is None and erase is None else torch.float32
        self.order = torch.empty(0, dtype=torch.long)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed; can be set. If it is off, targets are still soft labels, as in timm."""
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled

    def __len__(self) -> int:
        chosen = self.targets if self.sampler is None else self.sampler
        assert isinstance(chosen, Sized)  # the images on the device are no stream
        whole, rest = divmod(len(chosen), self.batch_size)
        return whole + bool(rest and not self.training)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        device = self.images.device
        self.generator.manual_seed(int(torch.empty((), dtype=torch.long).random_()))
        if self.sampler is not None:
            order = torch.tensor(list(self.sampler), device=device)
        elif self.training:
            order = torch.randperm(len(self.targets), device=device, generator=self.generator)
        else:
            order = torch.arange(len(self.targets), device=device)
        self.order = order
        batches = (self._batch(i) for i in range(len(self)))
        yield from _one_ahead(batches, device) if device.type == 'cuda' else batches

    def _batch(self, number: int) -> Tuple[torch.Tensor, torch.Tensor]:
        chosen = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        images = self._augmented(chosen) if self.training else self._normalised(chosen)
        images = images.permute(0, 3, 1, 2)
        images = images if self.channels_last else images.contiguous()
        targets = self.targets[chosen]
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.erase is not None:
            images = self.erase(images)
        return images, targets

    def batch(self, number: int) -> List[int]:
        """Return the indices of the images in batch `number` of the current epoch."""
        return self.order[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    def _normalised(self, chosen: torch.Tensor) -> torch.Tensor:
        """Chosen images as timm's loaders return them, bit by bit, [B, H, W, C]."""
        return self.images[chosen].float().sub_(self.mean).div_(self.std)

    def _augmented(self, chosen: torch.Tensor) -> torch.Tensor:
        """Crop, flip and normalise each chosen image independently, in few kernels, [B, H, W, C]."""
        rows, cols = self._draw_lines(len(chosen)) if self.padding or any(self.flips) else self.lines
        pixels = self.images[chosen[:, None, None], rows.unsqueeze(-1), cols.unsqueeze(-2)]
        images = torch.empty(pixels.shape, dtype=self.dtype, device=pixels.device)
        return torch.addcmul(self.summand, pixels, self.factor, out=images)

    def _draw_lines(self, count: int) -> List[torch.Tensor]:
        """Draw the rows and columns of the padded images to take, [count, H] and [count, W]."""
        options: Any = dict(device=self.images.device, generator=self.generator)
        offsets = torch.randint(2 * self.padding + 1, (2, count, 1), **options)
        drawn = []
        for lines, flipped, flip, offset in zip(self.lines, self.flipped_lines, self.flips, offsets):
            if flip:
                lines = torch.where(torch.rand(count, 1, **options) < flip, flipped, lines)
            drawn.append(lines + offset)
        return drawn


def _one_ahead(
    batches: Iterator[Tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Compute every batch on a stream of its own, while the one before is in use."""
    own = torch.cuda.Stream(device)
    own.wait_stream(torch.cuda.current_stream(device))  # which made the cached images

    def compute() -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        with torch.cuda.stream(own):
            return next(batches, None)

    batch = compute()
    while batch is not None:
        user = torch.cuda.current_stream(device)
        user.wait_stream(own)
        for t in batch:
            t.record_stream(user)  # its memory is not given away before that stream has used it
        following = compute()
        yield batch
        batch = following

"""Locate the feature map in the output of a module: NCHW, NHWC, or tokens after class and register tokens."""

import math
from functools import lru_cache
from typing import Any, FrozenSet, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.fx

__all__ = ['MapLayout', 'find_map']

# class, distillation and register tokens in total
MAX_PREFIX_TOKENS = 16


class MapLayout(NamedTuple):
    """Position and memory format of a map in the output of a module.

    Attributes:
        path: Indices to the tensor in a (nested) tuple or list; empty if the output is the tensor itself.
        kind: ``NCHW``, ``NHWC`` or ``NLC`` (tokens).
        channels: Number of channels C.
        height: Height H of the map of the probe image.
        width: Width W of the map of the probe image.
        prefix: Number of tokens before those of the map, for ``NLC``; default 0.
        image_size: (height, width) of the probe image in pixels.
    """

    path: Tuple[int, ...]
    kind: str
    channels: int
    height: int
    width: int
    prefix: int = 0
    image_size: Tuple[int, int] = (1, 1)

    def of(self, output: Any) -> torch.Tensor:
        """Return the tensor in `output` that contains the map."""
        for index in self.path:
            output = output[index]
        tensor: torch.Tensor = output
        return tensor

    def read(self, output: Any, image_size: Optional[Sequence[int]] = None) -> torch.Tensor:
        """Read the map from the output of the module.

        Args:
            output: Output of the module.
            image_size: (height, width) of the images; default: the aspect ratio of the probe image.

        Returns:
            Map [B, C, H, W], a view where possible.

        Raises:
            ValueError: The tokens form no grid with the aspect ratio of the images.
        """
        tensor = self.of(output)
        if self.kind == 'NCHW':
            return tensor
        if self.kind == 'NHWC':
            return tensor.permute(0, 3, 1, 2)
        shares = self.height / self.image_size[0], self.width / self.image_size[1]
        return _tokens_to_map(tensor, self.prefix, shares, self.image_size if image_size is None else image_size)


@torch.fx.wrap  # one node of a traced graph: the map's size depends on the images'
def _tokens_to_map(
    tokens: torch.Tensor, prefix: int, shares: Tuple[float, float], image_size: Sequence[int]
) -> torch.Tensor:
    """Reshape tokens [B, L, C] to a map [B, C, H, W]; `shares` are the map's height and width over the image's."""
    tokens = tokens[:, prefix:]
    count, ratio = tokens.shape[1], (shares[0] * image_size[0], shares[1] * image_size[1])
    scale = math.sqrt(count / (ratio[0] * ratio[1]))
    height = round(ratio[0] * scale)
    if height == 0 or count % height or abs(count // height - ratio[1] * scale) >= 1:
        raise ValueError(
            f'{count} tokens form no grid with the aspect ratio of {image_size[0]}x{image_size[1]} images; create the '
            f'network with img_size=(height, width) of these images.'
        )
    maps: torch.Tensor = tokens.transpose(1, 2).unflatten(2, (height, count // height))
    return maps


def find_map(output: Any, batch: int, image_size: Sequence[int], channels_last: bool = False) -> Optional[MapLayout]:
    """Find the map in the output of a module for a probe batch; of several, the one with most channels.

    Args:
        output: Output of the module.
        batch: Number of images in the probe batch.
        image_size: (height, width) of the probe images in pixels.
        channels_last: Whether the backbone declares its maps as NHWC; decides between NCHW and NHWC where a shape
            fits both. Default False.

    Returns:
        Layout of the map; None if no tensor in `output` can be a map of these images.
    """
    layouts = []
    height, width = image_size
    for path, tensor in _tensors(output):
        if tensor.ndim in (3, 4) and tensor.shape[0] == batch and tensor.is_floating_point():
            layout = _of_tensor(tuple(tensor.shape), image_size, channels_last)
            if layout is not None:
                layouts.append(layout._replace(path=path, image_size=(height, width)))
    return max(layouts, key=lambda layout: (layout.channels, layout.kind != 'NLC'), default=None)


def _tensors(output: Any, path: Tuple[int, ...] = ()) -> Iterator[Tuple[Tuple[int, ...], torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, (tuple, list)):
        for index, item in enumerate(output):
            yield from _tensors(item, (*path, index))


def _of_tensor(shape: Tuple[int, ...], image_size: Sequence[int], channels_last: bool) -> Optional[MapLayout]:
    grids = _grids(*image_size)
    if len(shape) == 3:
        fitting = [(h, w) for h, w in grids if 0 <= shape[1] - h * w <= MAX_PREFIX_TOKENS]
        if not fitting:
            return None
        height, width = max(fitting, key=lambda grid: grid[0] * grid[1])
        return MapLayout((), 'NLC', shape[2], height, width, prefix=shape[1] - height * width)
    kinds = {'NCHW': (shape[1], *shape[2:]), 'NHWC': (shape[3], *shape[1:3])}
    for kind in sorted(kinds, reverse=channels_last):
        channels, height, width = kinds[kind]
        if (height, width) in grids:
            return MapLayout((), kind, channels, height, width)
    return None


@lru_cache(maxsize=32)
def _grids(height: int, width: int) -> FrozenSet[Tuple[int, int]]:
    """Sizes that the map of an image can have, with tolerance for rounding of odd sizes and for unpadded convs."""
    grids = set()
    for reduction in range(1, max(height, width) + 1):
        h, w = height / reduction, width / reduction
        for off in (-2, -1, 0, 1):
            grids.add((math.floor(h) + off, math.floor(w) + off))
            grids.add((math.ceil(h) + off, math.ceil(w) + off))
    return frozenset((h, w) for h, w in grids if h > 0 and w > 0)

"""Where the map lies in what a module returns: NCHW, NHWC, or tokens behind class and register tokens."""

import math
from functools import lru_cache
from typing import Any, FrozenSet, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.fx

__all__ = ['MapLayout', 'find_map']

# class, distillation and register tokens
MAX_PREFIX_TOKENS = 16


class MapLayout(NamedTuple):
    """How to read a map [B, C, H, W] out of a module's output.

    Attributes:
        path: Indices down to the tensor in a (nested) tuple or list; empty where the output is the tensor.
        kind: ``NCHW``, ``NHWC`` or ``NLC``.
        channels: C.
        height: H for the probe image.
        width: W for the probe image.
        prefix: Tokens ahead of the map's, of ``NLC``.
        image_size: (height, width) of the probe image.
    """

    path: Tuple[int, ...]
    kind: str
    channels: int
    height: int
    width: int
    prefix: int = 0
    image_size: Tuple[int, int] = (1, 1)

    def of(self, output: Any) -> torch.Tensor:
        """The tensor in `output` that holds the map."""
        for index in self.path:
            output = output[index]
        return output

    def read(self, output: Any, image_size: Optional[Sequence[int]] = None) -> torch.Tensor:
        """The map [B, C, H, W] in `output`, a view where possible.

        Args:
            output: What the module returned.
            image_size: (height, width) of the images; default: something of the probe's proportions.

        Raises:
            ValueError: The tokens form no grid of these proportions.
        """
        output = self.of(output)
        if self.kind == 'NCHW':
            return output
        if self.kind == 'NHWC':
            return output.permute(0, 3, 1, 2)
        shares = self.height / self.image_size[0], self.width / self.image_size[1]
        return _tokens_to_map(output, self.prefix, shares, self.image_size if image_size is None else image_size)


@torch.fx.wrap  # one node of a traced graph: the map's size depends on the images'
def _tokens_to_map(
    tokens: torch.Tensor, prefix: int, shares: Tuple[float, float], image_size: Sequence[int]
) -> torch.Tensor:
    """Tokens [B, L, C] to the map [B, C, H, W] of images, whose height and width shrink to these shares or alike."""
    tokens = tokens[:, prefix:]
    count, ratio = tokens.shape[1], (shares[0] * image_size[0], shares[1] * image_size[1])
    scale = math.sqrt(count / (ratio[0] * ratio[1]))
    height = round(ratio[0] * scale)
    if height == 0 or count % height or abs(count // height - ratio[1] * scale) >= 1:
        raise ValueError(
            f'{count} tokens form no grid with the proportions of {image_size[0]}x{image_size[1]} images; make the '
            f'network with img_size=(height, width) of these images.'
        )
    return tokens.transpose(1, 2).unflatten(2, (height, count // height))


def find_map(output: Any, batch: int, image_size: Sequence[int], channels_last: bool = False) -> Optional[MapLayout]:
    """Find the map in a module's output for a probe; of several the widest.

    Args:
        output: What the module returned.
        batch: Images in the probe.
        image_size: (height, width) of the probe.
        channels_last: The backbone says that its maps are NHWC; decides where a shape can be read both ways.

    Returns:
        Its layout, None where no tensor in `output` can be a map of these images.
    """
    layouts = []
    for path, tensor in _tensors(output):
        if tensor.ndim in (3, 4) and tensor.shape[0] == batch and tensor.is_floating_point():
            layout = _of_tensor(tuple(tensor.shape), image_size, channels_last)
            if layout is not None:
                layouts.append(layout._replace(path=path, image_size=tuple(image_size)))
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
    """The map sizes that an image can be reduced to, odd sizes rounded either way, one less for unpadded convs."""
    grids = set()
    for reduction in range(1, max(height, width) + 1):
        h, w = height / reduction, width / reduction
        for off in (-2, -1, 0, 1):
            grids.add((math.floor(h) + off, math.floor(w) + off))
            grids.add((math.ceil(h) + off, math.ceil(w) + off))
    return frozenset((h, w) for h, w in grids if h > 0 and w > 0)

"""Read the maps of several modules while a backbone runs as a whole."""

from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn

from .layout import MapLayout

__all__ = ['Taps']


class _Tap:
    """A forward hook that keeps its module's output while it is open; copied along with the model."""

    def __init__(self):
        self.is_open = False
        self.output: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_open:
            self.output = output


class Taps:
    """Hooks on the tapped modules of a backbone.

    Args:
        backbone: A timm model.
        names: The tapped modules.
        layouts: Where the map lies in each one's output.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str], layouts: Sequence[MapLayout]):
        self.layouts = list(layouts)
        self.taps = [_Tap() for _ in names]
        for name, tap in zip(names, self.taps):
            backbone.get_submodule(name).register_forward_hook(tap)

    def __len__(self) -> int:
        return len(self.taps)

    def run(self, backbone: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the backbone on images [B, C, H, W].

        Returns:
            Its own output, and the maps [B, C, H, W] at the taps.
        """
        for tap in self.taps:
            tap.is_open = True
        try:
            output = backbone(images)
        finally:
            for tap in self.taps:
                tap.is_open = False
        maps = []
        for tap, layout in zip(self.taps, self.layouts):
            maps.append(layout.read(tap.output))
            tap.output = None
        return output, maps

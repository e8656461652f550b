"""Read the maps of several modules while a backbone runs as a whole."""

import threading
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn

from .probe import TracedModule

__all__ = ['Taps', 'is_tap']


class _Slot:
    """What one thread reads at one tap."""

    is_open = False
    output: Any = None


class _ThreadSlot(threading.local, _Slot):
    pass


class _Tap:
    """A forward hook that keeps its module's output while it is open; copied along with the model."""

    def __init__(self):
        self.in_graph = _Slot()
        self.in_thread = _ThreadSlot()

    @property
    def slot(self) -> _Slot:
        """A slot per thread; one for what a compiler traces, which knows no threads."""
        return self.in_graph if torch.compiler.is_compiling() else self.in_thread

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        slot = self.slot
        if slot.is_open:
            slot.output = output

    def __reduce__(self) -> Tuple:
        return _Tap, ()


def is_tap(hook: Any) -> bool:
    """Whether a forward hook is one with which an exit reads a module."""
    return isinstance(hook, _Tap)


class Taps:
    """Hooks on the tapped modules of a backbone.

    Args:
        backbone: A timm model.
        tapped: The modules, with where the map lies in each one's output.
    """

    def __init__(self, backbone: nn.Module, tapped: Sequence[TracedModule]):
        self.layouts = [place.layout for place in tapped]
        self.taps = [_Tap() for _ in tapped]
        for place, tap in zip(tapped, self.taps):
            backbone.get_submodule(place.name).register_forward_hook(tap)

    def remove(self, backbone: nn.Module) -> None:
        """Take the hooks off."""
        for module in backbone.modules():
            for key, hook in list(module._forward_hooks.items()):
                if any(hook is tap for tap in self.taps):
                    del module._forward_hooks[key]

    def __len__(self) -> int:
        return len(self.taps)

    def run(self, backbone: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the backbone on images [B, C, H, W].

        Returns:
            Its own output, and the maps [B, C, H, W] at the taps.
        """
        slots = [tap.slot for tap in self.taps]
        for slot in slots:
            slot.is_open = True
        try:
            output = backbone(images)
            if any(slot.output is None for slot in slots):
                raise RuntimeError('the call of the backbone did not run all modules that exits read')
            maps = [layout.read(slot.output, images.shape[-2:]) for slot, layout in zip(slots, self.layouts)]
        finally:
            for slot in slots:
                slot.is_open, slot.output = False, None
        return output, maps

"""Read the feature maps of tapped modules during a full forward pass of the backbone."""

import threading
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .probe import TracedModule

__all__ = ['Taps', 'find_hooked']


class _Slot:
    """Output recorded at one tap by one thread."""

    is_open = False
    output: Any = None


class _ThreadSlot(threading.local, _Slot):
    pass


class _Tap:
    """Forward hook that stores the output of its module while its slot is open; copied together with the model."""

    def __init__(self) -> None:
        self.in_graph = _Slot()
        self.in_thread = _ThreadSlot()

    @property
    def slot(self) -> _Slot:
        """Slot of the current thread; under ``torch.compile`` one slot for all, as it cannot trace thread locals."""
        return self.in_graph if torch.compiler.is_compiling() else self.in_thread

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        slot = self.slot
        if slot.is_open:
            slot.output = output

    def __reduce__(self) -> Tuple[Any, ...]:
        return _Tap, ()


def find_hooked(model: nn.Module) -> Optional[str]:
    """Name a module that has forward hooks other than taps; None if there is none."""
    name: str
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not all(isinstance(hook, _Tap) for hook in hooks):
                return name
    return None


class Taps:
    """Forward hooks on the tapped modules of a backbone.

    Args:
        backbone: A timm model.
        tapped: Tapped modules with the layout of their outputs, K.
    """

    def __init__(self, backbone: nn.Module, tapped: Sequence[TracedModule]):
        self.layouts = [module.map_layout for module in tapped]
        self.taps = [_Tap() for _ in tapped]
        for module, tap in zip(tapped, self.taps):
            backbone.get_submodule(module.name).register_forward_hook(tap)

    def remove(self, backbone: nn.Module) -> None:
        """Remove the hooks from `backbone`."""
        for module in backbone.modules():
            for key, hook in list(module._forward_hooks.items()):
                if any(hook is tap for tap in self.taps):
                    del module._forward_hooks[key]

    def __len__(self) -> int:
        return len(self.taps)

    def run(self, backbone: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the backbone and read the maps at the taps.

        Args:
            backbone: Backbone that has these hooks.
            images: Images [B, C, H, W].

        Returns:
            Output of the backbone, and K maps [B, C_k, H_k, W_k].

        Raises:
            RuntimeError: A tapped module did not run.
        """
        slots = [tap.slot for tap in self.taps]
        for slot in slots:
            slot.is_open = True
        try:
            output = backbone(images)
            if any(slot.output is None for slot in slots):
                raise RuntimeError('the forward pass of the backbone did not run all modules that the exits tap')
            maps = [layout.read(slot.output, images.shape[-2:]) for slot, layout in zip(slots, self.layouts)]
        finally:
            for slot in slots:
                slot.is_open, slot.output = False, None
        return output, maps

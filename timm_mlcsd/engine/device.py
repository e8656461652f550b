"""Where a network runs and in which precision and memory format."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Optional

import torch

from ..errors import UserError, as_user_error

__all__ = ['DeviceConfig', 'compile_forward', 'make_autocast', 'resolve_device', 'to_channels_last']


@dataclass
class DeviceConfig:
    """Device, precision and memory format.

    Attributes:
        device: Device, such as ``cuda`` or ``cpu``; None for a GPU where there is one.
        amp: Whether forward passes run under autocast.
        amp_dtype: Data type of autocast, ``float16`` or ``bfloat16``.
        channels_last: Whether weights and images have that memory format.
        torchcompile: Backend of ``torch.compile``, None for eager mode.
        torchcompile_mode: Mode of ``torch.compile``.
    """

    device: Optional[str] = None
    amp: bool = False
    amp_dtype: str = 'float16'
    channels_last: bool = False
    torchcompile: Optional[str] = None
    torchcompile_mode: Optional[str] = None

    @property
    def compiles_graphs(self) -> bool:
        """Whether ``torch.compile`` makes CUDA graphs, which overwrite their outputs with every call."""
        return self.torchcompile == 'cudagraphs' or self.torchcompile_mode in ('reduce-overhead', 'max-autotune')


def resolve_device(config: DeviceConfig) -> torch.device:
    """The device that is named, or the best there is.

    Raises:
        UserError: It cannot be used, or the settings of ``torch.compile`` are wrong.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if config.torchcompile and config.torchcompile not in backends:
        raise UserError(f'--torchcompile {config.torchcompile} is unknown; choose one of {", ".join(backends)}.')
    if config.torchcompile_mode and not config.torchcompile:
        raise UserError(f'--torchcompile-mode {config.torchcompile_mode} does nothing without --torchcompile.')
    with as_user_error(f'--device {config.device} cannot be used'):
        device = torch.device(config.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if device.type == 'meta':
            raise UserError('--device meta: expected a device that computes, cpu or cuda say.')
        if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
            device = _own_gpu(device)
        if device.index is not None and device.type == 'cuda':
            torch.cuda.set_device(device)  # a checkpoint keeps the random state of the current device
        torch.empty(0, device=device)
    return device


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process of torchrun."""
    rank, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(
            f'--device {device} is one GPU for all processes of torchrun: --device cuda gives each its own.'
        )
    if rank >= count:
        raise UserError(
            f'{count} GPUs for {os.environ.get("LOCAL_WORLD_SIZE")} processes on this machine: start no more than that '
            f'(torchrun --nproc-per-node), or train with --device cpu.'
        )
    return torch.device('cuda', rank)


def make_autocast(config: DeviceConfig, device: torch.device, cache_enabled: bool = True) -> ContextManager[Any]:
    """The context of forward passes."""
    if not config.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype), cache_enabled=cache_enabled)


def compile_forward(forward: Callable[..., Any], config: DeviceConfig) -> Callable[..., Any]:
    """The function compiled, or unchanged in eager mode."""
    if not config.torchcompile:
        return forward
    with as_user_error(f'--torchcompile {config.torchcompile} --torchcompile-mode {config.torchcompile_mode}'):
        return torch.compile(forward, backend=config.torchcompile, mode=config.torchcompile_mode)


def to_channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] in the channels-last memory format."""
    return images.contiguous(memory_format=torch.channels_last)

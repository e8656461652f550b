"""Forward and backward pass of a training step as CUDA graphs, which start all their kernels at once."""

import gc
import logging
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..data import CachedLoader
from ..errors import as_user_error
from ..task import MLCSDTask
from .config import TrainConfig
from .device import DeviceConfig, make_autocast, to_channels_last
from .loaders import mixup_active

__all__ = ['capture_step']

_logger = logging.getLogger(__name__)


def capture_step(
    task: MLCSDTask, batches: Any, config: TrainConfig, data_config: Dict[str, Any], num_classes: int
) -> None:
    """Replace the training passes of a task by CUDA graphs, by ``torch.cuda.make_graphed_callables``.

    The graphs belong to the modules' present modes and to the parameters that train now; capture again after a change.
    Capturing changes neither weights nor running statistics nor random states. DDP wraps the module afterwards.
    A replay overwrites outputs and gradients of the one before. Batches of another size run without graphs.

    Args:
        task: The task; set to training mode.
        batches: Loader of training batches on the task's device.
        config: Settings of the training.
        data_config: Preprocessing.
        num_classes: Number of classes C.

    Raises:
        UserError: The passes cannot be captured.
    """
    task.train()
    if task.criterion.ramp is not None:
        task.criterion.ramp.auto = False  # the loop steps it
    random_state = torch.cuda.get_rng_state(task.device)
    sample = _sample_batch(task.device, batches, config, data_config, num_classes)
    module = unwrap_model(task.trainable_module)
    if module.__dict__.pop('forward', None) is not None:
        gc.collect()  # frees the graphs before, which refer to themselves
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    step = _Step(module, config.device, task.device)
    with as_user_error('--cuda-graphs: the training step cannot be captured'):
        torch.cuda.make_graphed_callables(step, sample, allow_unused_input=True)
    step.forget()
    for buffer, before in buffers:
        buffer.copy_(before)
    torch.cuda.set_rng_state(random_state, task.device)
    module.forward = _Replay(step, *(t.shape for t in sample))


def _sample_batch(
    device: torch.device, batches: Any, config: TrainConfig, data_config: Dict[str, Any], num_classes: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """A batch of the sizes and types that the loader returns; its values do not matter."""
    size = config.data.batch_size
    cached = batches.loader if isinstance(batches.loader, CachedLoader) else None
    images = torch.randn(size, *data_config['input_size'], device=device)
    images = images.to(cached.dtype if cached else torch.float32)
    if config.device.channels_last:
        images = to_channels_last(images)
    labels = torch.arange(size, device=device) % num_classes
    if mixup_active(config.augment):
        return images, torch.nn.functional.one_hot(labels, num_classes).float()
    return images, labels


class _Step(nn.Module):
    """The passes with tensors alone as inputs and outputs, few of them: each takes a kernel in the backward pass."""

    def __init__(self, module: nn.Module, config: DeviceConfig, device: torch.device):
        super().__init__()
        self.module = module
        self.config = config
        self.device = device
        self.names: Tuple[str, ...] = ()
        self.loss: Optional[torch.Tensor] = None

    def forget(self) -> None:
        """Free the autograd nodes of the capture: those of the parameters would stay on its stream."""
        assert self.loss is not None  # after the capture
        self.loss.detach_()
        self.loss = None

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, its components [P], and the logits of all exits, [K, B, C]."""
        # a graph would keep weights that autocast has cast before
        with make_autocast(self.config, self.device, cache_enabled=False):
            result: Dict[str, Any] = type(self.module).forward(self.module, images, target)
        loss, logits = result['loss'], torch.stack(result['exit_logits']).detach()
        self.names = tuple(name for name in result if name not in ('loss', 'output', 'exit_logits'))
        self.loss = loss
        return loss, torch.stack([result[name].detach() for name in self.names]), logits


class _Replay:
    """Forward function of the task's module that replays its graphs."""

    def __init__(self, step: _Step, *shapes: torch.Size):
        self.step = step
        self.shapes = shapes
        self.warned = False

    def __call__(
        self, input: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor] = None
    ) -> Dict[str, Any]:
        module = self.step.module
        shapes = input.shape, target.shape
        if not module.training or shapes != self.shapes:
            self._warn_once(shapes)
            result: Dict[str, Any] = type(module).forward(module, input, target, indices)
            return result
        loss, parts, logits = self.step(input, target)
        exit_logits = logits.unbind()
        named = dict(zip(self.step.names, parts.unbind()))
        return dict(loss=loss, **named, output=exit_logits[-1], exit_logits=exit_logits)

    def _warn_once(self, shapes: Tuple[torch.Size, ...]) -> None:
        if self.step.module.training and not self.warned:
            self.warned = True
            _logger.warning(
                f'--cuda-graphs: a batch of {tuple(shapes[0])} with targets {tuple(shapes[1])} runs without graphs, '
                f'which are for {tuple(self.shapes[0])} with {tuple(self.shapes[1])}'
            )

"""Multi-exit training as a timm task: model and loss, trained, wrapped and saved together."""

from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model

from .losses import MLCSDLoss
from .models import MultiExitModel, MultiExitOutput

__all__ = ['MLCSDTask']


class MultiExitTrainableModule(nn.Module):
    """Model and loss in one module, so that DDP, EMA, clipping and the optimizer see the parameters of both."""

    def __init__(self, model: nn.Module, criterion: MLCSDLoss):
        super().__init__()
        self.model = model
        self.criterion = criterion

    def no_weight_decay(self):
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False):
        if not hasattr(self.model, 'group_matcher'):
            raise ValueError('timm gives this backbone no layer groups (group_matcher), so layer_decay cannot be used.')
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        # what only the loss owns trains like the last layers
        return lambda name: layers[name[len('model.') :]] if name.startswith('model.') else last

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor] = None
    ) -> Dict[str, Any]:
        output = self.model(input)
        parts = self.criterion(output, target, return_components=True, indices=indices)
        return dict(parts, output=output.logits[-1], exit_logits=output.logits)

    def forward_exits(self, input: torch.Tensor) -> MultiExitOutput:
        return self.model.forward_exits(input)


class MLCSDTask(TrainingTask):
    """Train a multi-exit network with `MLCSDLoss`.

    Parameters that only training needs (the CWEM) stay in the criterion and out of the evaluated model; checkpoints
    keep them as task state.

    Args:
        model: A `MultiExitModel`.
        criterion: Its loss.
        device: Where the criterion goes (default: where the model is).
        verbose: Log what the task does.

    Examples:
        ```python
        model = timm.create_model('mlcsd_resnet18', num_classes=100)
        task = MLCSDTask(model, MLCSDLoss(model.num_exits, model.exit_feature_dim))
        optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.05)
        result = task(images, target)
        result['loss'].backward()
        ```
    """

    def __init__(
        self,
        model: MultiExitModel,
        criterion: MLCSDLoss,
        device: Optional[torch.device] = None,
        verbose: bool = True,
    ):
        super().__init__(device=device or next(model.parameters()).device, verbose=verbose)
        self.trainable_module = MultiExitTrainableModule(model, criterion.to(device=self.device))

    @property
    def criterion(self) -> MLCSDLoss:
        return unwrap_model(self.trainable_module).criterion

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'MLCSDTask':
        """Wrap model and criterion together in DistributedDataParallel; again, after parameters were frozen or freed.

        What the loss remembers of training images it shares with the other processes itself.
        """
        from torch.nn.parallel import DistributedDataParallel

        module = self.trainable_module
        module = module.module if isinstance(module, DistributedDataParallel) else module
        criterion = unwrap_model(module).criterion
        buffers = dict(criterion.named_buffers())
        # by identity: a compiled module has other names
        remembered = {id(buffers[name]) for name in criterion.bank_buffer_names()}
        memories = [name for name, buffer in module.named_buffers() if id(buffer) in remembered]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, memories)
        self.trainable_module = DistributedDataParallel(module, device_ids=device_ids, **ddp_kwargs)
        return self

    def synchronize_statistics(self, world_size: int, how: str = 'reduce') -> None:
        """After an epoch, give all processes the same running statistics, the loss's included.

        Args:
            world_size: How many processes there are.
            how: ``reduce`` for their mean, ``broadcast`` for the first one's, empty for neither.
        """
        for module in self.trainable_module.modules():
            # frozen ones are alike already, and a mean of equal numbers may be another number
            if how and module.training and hasattr(module, 'running_mean'):
                distribute_bn(module, world_size, reduce=how == 'reduce')
        if self.has_ema():
            # the first process's is the one that is saved
            distribute_bn(self.trainable_module_ema, world_size)

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the forward pass with its loss, and the model for evaluation."""
        model = self.trainable_module.model
        self.eval_model = torch.compile(model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def setup_ema(self, *args: Any, device: Optional[torch.device] = None, **kwargs: Any) -> nn.Module:
        """As timm's; what the loss remembers of training images is not averaged: both modules have the one memory, if
        they are on one device in one precision."""
        criterion = self.criterion
        shared = (
            {}
            if device or kwargs.get('dtype')
            else {name: criterion.get_buffer(name) for name in criterion.bank_buffer_names()}
        )
        # out of the way, lest it be copied
        _set_buffers(criterion, {name: memory.new_empty(0) for name, memory in shared.items()})
        ema = super().setup_ema(*args, device=device, **kwargs)
        for module in (criterion, unwrap_model(self.get_trainable_module(ema=True)).criterion):
            _set_buffers(module, shared)
        return ema

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = unwrap_model(resolved) if resolved is not None else None
        return trainable.model if isinstance(trainable, MultiExitTrainableModule) else resolved

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        state = unwrap_model(module).criterion.state_dict() if module is not None else None
        return {'criterion': state} if state else {}

    def load_task_state(
        self,
        state: Optional[Dict[str, Any]],
        strict: bool = True,
        module: Optional[nn.Module] = None,
        ema: bool = False,
    ) -> None:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('Cannot load EMA task state before setup_ema().')
        criterion, state = unwrap_model(module).criterion, dict((state or {}).get('criterion', {}))
        for name in criterion.bank_buffer_names():
            if ema and criterion.get_buffer(name) is self.criterion.get_buffer(name):
                state[name] = criterion.get_buffer(name)  # older checkpoints hold an averaged one
        criterion.load_state_dict(state, strict=strict)

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor] = None
    ) -> Dict[str, Any]:
        """Compute outputs and loss.

        Args:
            input: Images [B, C, H, W].
            target: Class indices [B] or soft targets [B, C].
            indices: Which images of the training set these are, [B], for losses that remember them.

        Returns:
            ``loss``, its parts (see `MLCSDLoss`), ``output`` (the last exit's logits) and ``exit_logits`` (K of them).
        """
        return self.trainable_module(input, target, indices)


def _set_buffers(module: nn.Module, buffers: Dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition('.')
        setattr(module.get_submodule(owner), leaf, buffer)

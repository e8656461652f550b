"""timm training task for multi-exit networks, which trains, wraps and saves model and loss together."""

from typing import Any, Callable, Dict, List, Optional, Set, cast

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model

from .losses import MLCSDLoss
from .models import MultiExitModel, MultiExitOutput

__all__ = ['MLCSDTask']


class MultiExitTrainableModule(nn.Module):
    """Model and loss in one module, so that DDP, EMA, gradient clipping and the optimizer include the loss parameters.

    Args:
        model: A `MultiExitModel`.
        criterion: Loss of the model.
    """

    def __init__(self, model: MultiExitModel, criterion: MLCSDLoss):
        super().__init__()
        self.model = model
        self.criterion = criterion

    def no_weight_decay(self) -> Set[str]:
        """Return the names of the parameters to exclude from weight decay."""
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from parameter names to layer groups; the loss belongs to the last group.

        Raises:
            ValueError: timm defines no layer groups for the backbone.
        """
        matcher: Any = getattr(self.model, 'group_matcher', None)
        if matcher is None:
            raise ValueError('timm defines no layer groups (group_matcher) for this backbone; do not use layer_decay.')
        layers: Dict[str, int] = group_parameters(self.model, matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers[name[len('model.') :]] if name.startswith('model.') else last

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor] = None
    ) -> Dict[str, Any]:
        """Compute outputs and loss; see `MLCSDTask.forward`."""
        output = self.model(input)
        parts = self.criterion(output, target, return_components=True, indices=indices)
        return dict(parts, output=output.logits[-1], exit_logits=output.logits)

    def forward_exits(self, input: torch.Tensor) -> MultiExitOutput:
        """Compute the outputs of all exits of the model for images [B, C, H, W]."""
        return self.model.forward_exits(input)


class MLCSDTask(TrainingTask):
    """Train a multi-exit network with `MLCSDLoss`.

    Parameters that are needed in training only (the CWEM) belong to the loss, not to the evaluated model; checkpoints
    store them as task state.

    Args:
        model: A `MultiExitModel`.
        criterion: Loss of the model.
        device: Device of the loss; default the device of the model.
        verbose: Whether timm's base class logs its actions; default True.

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
        self.trainable_module: nn.Module = MultiExitTrainableModule(model, criterion.to(device=self.device))

    @property
    def criterion(self) -> MLCSDLoss:
        """Loss of the model."""
        criterion: MLCSDLoss = unwrap_model(self.trainable_module).criterion
        return criterion

    def prepare_distributed(self, device_ids: Optional[List[int]] = None, **ddp_kwargs: Any) -> 'MLCSDTask':
        """Wrap model and loss together in DistributedDataParallel.

        To be repeated after parameters have been frozen or unfrozen. Memory banks of the loss are excluded, because the
        loss synchronises them itself.

        Args:
            device_ids: Devices of this process, as in DistributedDataParallel; default None.
            **ddp_kwargs: Further arguments of DistributedDataParallel.

        Returns:
            This task.
        """
        from torch.nn.parallel import DistributedDataParallel

        module = self.trainable_module
        module = module.module if isinstance(module, DistributedDataParallel) else module
        criterion = unwrap_model(module).criterion
        buffers = dict(criterion.named_buffers())
        # compare by identity, because names differ in a compiled module
        banks = {id(buffers[name]) for name in criterion.bank_buffer_names()}
        ignored = [name for name, buffer in module.named_buffers() if id(buffer) in banks]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        self.trainable_module = DistributedDataParallel(module, device_ids=device_ids, **ddp_kwargs)
        return self

    def synchronize_statistics(self, world_size: int, how: str = 'reduce') -> None:
        """Synchronise the BatchNorm statistics of model and loss over all processes, after an epoch.

        Args:
            world_size: Number of processes.
            how: ``reduce`` (default) for their mean, ``broadcast`` for those of the first process, empty for no
                synchronisation of the trained module. Those of the EMA module are always broadcast.
        """
        for module in self.trainable_module.modules():
            # skip frozen modules: their statistics are equal already, and averaging could round them
            if how and module.training and hasattr(module, 'running_mean'):
                distribute_bn(module, world_size, reduce=how == 'reduce')
        if self.has_ema():
            # broadcast, because the first process saves its EMA module
            distribute_bn(self.trainable_module_ema, world_size)

    def compile(  # type: ignore[override]  # timm overrides nn.Module.compile, with these arguments
        self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the forward pass with the loss for training, and the model for evaluation.

        Args:
            backend: Backend of ``torch.compile``; default ``inductor``.
            mode: Mode of ``torch.compile``; default None.
            **compile_kwargs: Further arguments of ``torch.compile``.

        Returns:
            Compiled model for evaluation.
        """
        options: Dict[str, Any] = dict(backend=backend, mode=mode, **compile_kwargs)
        model = _compiled(self.trainable_module.get_submodule('model'), options)
        self.eval_model = model
        self.trainable_module = _compiled(self.trainable_module, options)
        return model

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: Optional[torch.device] = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Set up the EMA of model and loss as timm does, without averaging the memory banks of the loss.

        The trained and the averaged module share the memory banks if both have the same device and dtype.

        Args:
            decay: Weight of the past in the averages; default 0.9999.
            use_warmup: Whether to start with a smaller weight; default False.
            device: Device of the averaged module; default that of the trained module.
            **kwargs: Further arguments of ``TrainingTask.setup_ema``.

        Returns:
            Averaged module.
        """
        criterion = self.criterion
        shared = (
            {}
            if device or kwargs.get('dtype')
            else {name: criterion.get_buffer(name) for name in criterion.bank_buffer_names()}
        )
        # remove the memory banks during the setup, which would copy them
        _set_buffers(criterion, {name: bank.new_empty(0) for name, bank in shared.items()})
        ema: nn.Module = super().setup_ema(decay, use_warmup, device=device, **kwargs)
        for module in (criterion, unwrap_model(self.get_trainable_module(ema=True)).criterion):
            _set_buffers(module, shared)
        return ema

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the model for evaluation, without the loss.

        Args:
            module: Trainable module or model to use; default the trained module.
            ema: Whether to use the EMA module instead; default False.
        """
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = unwrap_model(resolved) if resolved is not None else None
        return trainable.model if isinstance(trainable, MultiExitTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Return the parameters for gradient clipping.

        Args:
            exclude_head: Whether to leave out the classifiers of all exits; default False.
        """
        trainable = unwrap_model(self.get_trainable_module())
        left_out = trainable.model.classifiers() if exclude_head else []
        ids = {id(p) for module in left_out for p in module.parameters()}
        return [p for p in trainable.parameters() if id(p) not in ids]

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return the state of the loss for a checkpoint; empty if the loss has no state.

        Args:
            module: Trainable module to use; default the trained module.
            ema: Whether to use the EMA module instead; default False.
        """
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
        """Load the state of the loss from a checkpoint.

        Args:
            state: State from `get_task_state`; None or empty if the loss has no state.
            strict: Whether names must match exactly; default True.
            module: Trainable module to use; default the trained module.
            ema: Whether to use the EMA module instead; default False.

        Raises:
            RuntimeError: `ema` is set before `setup_ema` was called, or the state does not fit.
        """
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('the EMA task state cannot be loaded before setup_ema(); call setup_ema() first.')
        criterion, state = unwrap_model(module).criterion, dict((state or {}).get('criterion', {}))
        for name in criterion.bank_buffer_names():
            if ema and criterion.get_buffer(name) is self.criterion.get_buffer(name):
                state[name] = criterion.get_buffer(name)  # older checkpoints contain averaged memory banks
        criterion.load_state_dict(state, strict=strict)

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor] = None
    ) -> Dict[str, Any]:
        """Compute outputs and loss.

        Args:
            input: Images [B, C, H, W].
            target: Class indices [B] or soft targets [B, C].
            indices: Indices of the images in the training set, [B]; required by losses with a memory bank, default
                None.

        Returns:
            Dict of ``loss``, its components (see `MLCSDLoss`), ``output`` (logits of the last exit, [B, C]) and
            ``exit_logits`` (logits of all exits, K tensors [B, C]).
        """
        result: Dict[str, Any] = self.trainable_module(input, target, indices)
        return result


def _compiled(module: nn.Module, options: Dict[str, Any]) -> nn.Module:
    return cast(nn.Module, torch.compile(module, **options))  # torch.compile is typed for functions


def _set_buffers(module: nn.Module, buffers: Dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition('.')
        setattr(module.get_submodule(owner), leaf, buffer)

"""Parameters, gradients and optimizer state sharded over the processes (FSDP2)."""

from typing import Any, Dict

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..distributed import DistributedContext
from ..models import MultiExitModel
from ..task import MLCSDTask

__all__ = ['load_sharded', 'shard_task', 'sharded_state']

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard_task(task: MLCSDTask, model: MultiExitModel, dist_context: DistributedContext) -> None:
    """Shard network and loss block by block, before the optimizer is created.

    Args:
        task: Task that owns network and loss; their parameters move to its device.
        model: The network.
        dist_context: Processes that train together.
    """
    mesh = init_device_mesh(task.device.type, (dist_context.size,))
    plan = getattr(model, 'plan', None)
    names = set() if plan is None else {module.name for module in plan.modules}
    wrapped = getattr(model, 'backbone', model)
    blocks = [module for name, module in wrapped.named_modules() if name in names]
    for module in [*blocks, *model.heads, task.criterion]:
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fully_shard(task.trainable_module, mesh=mesh)
    # called by name, not as modules
    register_fsdp_forward_method(model, 'forward_exits')
    register_fsdp_forward_method(task.trainable_module, 'forward_exits')
    register_fsdp_forward_method(task.criterion, 'mixing_weights')


def sharded_state(task: MLCSDTask, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The unsharded state of task and optimizer for a checkpoint, on the CPU; all processes call it."""
    state = get_model_state_dict(task.trainable_module, options=WHOLE)
    optimizer_state = get_optimizer_state_dict(task.trainable_module, optimizer, options=WHOLE)
    parts = {
        key: {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        for key, prefix in (('state_dict', 'model.'), ('criterion', 'criterion.'))
    }
    return dict(
        state_dict=parts['state_dict'], task_state=dict(criterion=parts['criterion']), optimizer=optimizer_state
    )


def load_sharded(
    task: MLCSDTask, checkpoint: Dict[str, Any], optimizer: torch.optim.Optimizer, weights_only: bool
) -> None:
    """Load a state of `sharded_state`, optionally without that of the optimizer."""
    criterion = checkpoint.get('task_state', {}).get('criterion', {})
    state = {f'model.{name}': t for name, t in checkpoint['state_dict'].items()}
    state.update({f'criterion.{name}': t for name, t in criterion.items()})
    set_model_state_dict(task.trainable_module, state, options=WHOLE)
    # an optimizer without momentum has none
    if checkpoint['optimizer']['state'] and not weights_only:
        for group in optimizer.param_groups:
            # which the schedule, yet to be made, left in the checkpoint
            group.setdefault('initial_lr', group['lr'])
        set_optimizer_state_dict(task.trainable_module, optimizer, checkpoint['optimizer'], options=WHOLE)

"""Distributed training: initialisation of torch.distributed and collective operations."""

import gc
import logging
import os
import sys
import warnings
from datetime import timedelta
from typing import Any, List, NamedTuple, NoReturn, Optional

import torch
import torch.distributed as dist

from .errors import UserError

__all__ = [
    'SINGLE_PROCESS',
    'DistributedContext',
    'all_gather_rows',
    'all_reduce_mean',
    'end_process',
    'init_distributed',
    'launched_context',
]

# Before 2.8, PyTorch frees a group with Python's lock held and waits for the threads of gloo, which can need that lock
# to free a tensor; a group that is kept is freed when the process has ended.
_FINISHED_GROUPS: List[Any] = []


class DistributedContext(NamedTuple):
    """Rank of this process and number of processes, with the collectives of the training loop.

    Every method but `is_primary` and `shutdown` is collective: all processes call it, in the same order.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        local_rank: Rank of this process on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_primary(self) -> bool:
        """Whether this process, of rank 0, writes files and prints."""
        return self.rank == 0

    def any_rank(self, flag: bool) -> bool:
        """Whether a flag is set in any process.

        Args:
            flag: Flag of this process.
        """
        if self.size == 1:
            return flag
        # a CPU tensor: the exchange does not synchronise with a GPU
        tensor = torch.tensor(float(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes.

        Args:
            tensor: Tensor of this process, which is not changed.

        Returns:
            The sum, of the same shape.
        """
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> List[Any]:
        """Gather a value of each process.

        Args:
            value: Value of this process; it is pickled.

        Returns:
            The values of all processes, ordered by rank, [size].
        """
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def shutdown(self) -> None:
        """Destroy the process group, if there is one."""
        if dist.is_initialized():
            if torch.__version__ < '2.8':  # compares versions, not text
                _FINISHED_GROUPS.append(dist.group.WORLD)
            dist.destroy_process_group()


SINGLE_PROCESS = DistributedContext()


def launched_context() -> DistributedContext:
    """Rank of this process and number of processes, for work in which the processes do not communicate.

    Returns:
        The context as torchrun set it; `SINGLE_PROCESS` without torchrun. Its collectives need `init_distributed`.

    Raises:
        UserError: The environment variables of torchrun are wrong.
    """
    if 'RANK' not in os.environ or 'WORLD_SIZE' not in os.environ:
        return SINGLE_PROCESS
    try:
        rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
        if not 0 <= rank < size:
            raise ValueError(f'RANK={rank}, WORLD_SIZE={size}')
    except ValueError as e:
        raise UserError(f'RANK, WORLD_SIZE and LOCAL_RANK are not as torchrun sets them: {e}.') from None
    return DistributedContext(rank, size, local_rank)


def init_distributed(device: torch.device, timeout: Optional[timedelta] = None) -> DistributedContext:
    """Initialise torch.distributed if torchrun has started this process.

    Args:
        device: Device that this process works on.
        timeout: Time after which an operation of all processes fails; default: that of PyTorch.

    Returns:
        The context; `SINGLE_PROCESS` without torchrun.

    Raises:
        UserError: torch.distributed could not be initialised.
    """
    if 'RANK' not in os.environ or 'WORLD_SIZE' not in os.environ:
        return SINGLE_PROCESS
    local_rank = launched_context().local_rank
    try:
        store, rank, size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun's store keeps the addresses of the killed processes after a restart
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'torch.distributed could not be initialised: {e}') from e
    context = DistributedContext(dist.get_rank(), dist.get_world_size(), local_rank)
    if not context.is_primary:
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter('ignore')
    return context


def all_gather_rows(*tensors: torch.Tensor) -> List[torch.Tensor]:
    """Concatenate tensors over all processes, without gradients.

    Args:
        *tensors: Tensors, [B, ...], with the same B in every process.

    Returns:
        The concatenated tensors, [processes * B, ...], in the order of the arguments.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    gathered = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        gathered.append(torch.cat(parts))
    return gathered


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average a tensor over all processes, without gradients.

    Args:
        tensor: Tensor of this process, which is not changed.

    Returns:
        The mean, of the same shape.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def end_process() -> NoReturn:
    """End a finished process of a distributed job at once, with exit code 0.

    FSDP's caches keep threads of gloo alive. If such a thread frees a tensor while Python shuts down, it aborts the
    process, and torchrun reports the job as failed.
    """
    gc.collect()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

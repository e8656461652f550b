"""The processes that train one network together, and what they tell each other."""

import gc
import logging
import os
import sys
import warnings
from typing import Any, List, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ..errors import UserError

__all__ = ['ALONE', 'World', 'end_process', 'join_world']


class World(NamedTuple):
    """Which of how many processes this is; alone, it has nobody to ask.

    Every method but `is_first` is collective: all processes call it, in the same order.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        local_rank: Of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        # on the CPU: nobody waits for a GPU
        says = torch.tensor(float(flag))
        dist.all_reduce(says, op=dist.ReduceOp.MAX)
        return bool(says)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> List[Any]:
        """What every process has, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Part from the other processes; not collective."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()


def join_world(device: torch.device) -> World:
    """Join the processes that torchrun has started, or stay alone.

    Args:
        device: Where this one trains.

    Raises:
        UserError: They don't find each other.
    """
    if 'RANK' not in os.environ or 'WORLD_SIZE' not in os.environ:
        return ALONE
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    try:
        store, rank, size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun's store outlives a restart, and would still tell where the killed processes could be reached
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'the processes of this job do not find each other: {e}') from e
    world = World(dist.get_rank(), dist.get_world_size(), local_rank)
    if not world.is_first:
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter('ignore')
    return world


def end_process() -> NoReturn:
    """End a process of a job that has done its work, with code 0 and at once.

    Caches of FSDP keep gloo's threads; one that lets go of a tensor while Python shuts down aborts the process, and
    torchrun would take the job for failed.
    """
    gc.collect()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

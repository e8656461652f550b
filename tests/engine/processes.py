"""Two processes that know of each other."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from timm_mlcsd.distributed import DistributedContext


def in_two_processes(work, tmp_path):
    """What `work(rank)` returns in each; `work` is a function of a module."""
    mp.spawn(_start, (str(tmp_path / 'store'), work, str(tmp_path)), nprocs=2)
    return [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]


def _start(rank, store, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.save(work(rank), f'{folder}/{rank}.pt')
    # A process that destroys its group while the other still talks can leave that one waiting (seen with PyTorch 2.6).
    dist.barrier()
    DistributedContext(rank, 2).shutdown()

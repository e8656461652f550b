"""The states of all random number generators, saved, restored and kept apart."""

import random
from typing import Any, Dict, Iterable, Iterator

import numpy as np
import torch

__all__ = ['isolated_rng', 'rng_state', 'set_rng_state']


def rng_state() -> Dict[str, Any]:
    """The states of the generators of PyTorch, CUDA, NumPy and Python, as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy['state']['key'].astype(np.int64))
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        numpy=(numpy['bit_generator'], keys, numpy['state']['pos'], numpy['has_gauss'], numpy['gauss']),
        python=random.getstate(),
    )


def set_rng_state(states: Dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(states['torch'])
    if states['cuda'] is not None:
        torch.cuda.set_rng_state(states['cuda'])
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states['python'])


def isolated_rng(batches: Iterable[Any], every_batch: bool = True) -> Iterator[Any]:
    """Iterate over batches with generator states of their own.

    Random numbers that the network draws (for dropout) then do not change the batches that follow, so that a resumed
    epoch can skip its first batches without computing them.

    Args:
        batches: Iterable of batches.
        every_batch: Whether every batch draws from these generators; False if only the first does, with the start of
            the iteration, so that no states are copied for the others.
    """
    own = rng_state()
    iterator = iter(batches)
    while True:
        outer = rng_state()
        set_rng_state(own)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            own = rng_state()
            set_rng_state(outer)
        yield batch
        if not every_batch:
            yield from iterator
            return

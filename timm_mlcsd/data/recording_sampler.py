"""Which images are in which batch, for whoever must name them."""

from array import array
from typing import Iterator, List

from torch.utils.data import Sampler

__all__ = ['RecordingSampler']


class RecordingSampler(Sampler):
    """The same indices, remembered until the next epoch draws others.

    Args:
        sampler: Gives them.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.drawn = array('q')

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.drawn = array('q')
        for index in self.sampler:
            self.drawn.append(index)
            yield index

    def batch(self, number: int, size: int) -> List[int]:
        """What was drawn for the batch of that number."""
        return list(self.drawn[number * size : (number + 1) * size])

"""Record the images of each batch, so that error messages can name them."""

from array import array
from typing import Iterator, List, Sized

from torch.utils.data import Sampler

__all__ = ['RecordingSampler']


class RecordingSampler(Sampler[int]):
    """Sampler that returns the indices of another sampler and records them until the next epoch.

    Args:
        sampler: Sampler of the indices.

    Attributes:
        drawn: Indices drawn in the current epoch.
    """

    def __init__(self, sampler: Sampler[int]):
        self.sampler = sampler
        self.drawn = array('q')

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)  # samplers of data sets that are no streams
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.drawn = array('q')
        for index in self.sampler:
            self.drawn.append(index)
            yield index

    def batch(self, number: int, size: int) -> List[int]:
        """Return the indices of a batch.

        Args:
            number: Number of the batch in the current epoch, from 0.
            size: Batch size.
        """
        return list(self.drawn[number * size : (number + 1) * size])

"""What tells the samples of a data set apart, so that a checkpoint knows which ones it was not trained on."""

import hashlib
import os
from typing import Any, Iterable

import numpy as np
import torch

__all__ = ['sample_keys']


def sample_keys(dataset: Any, indices: Iterable[int]) -> torch.Tensor:
    """A number per sample: of its file's path below the data folder, or, where there are no files, of its content.

    Args:
        dataset: Gives (PIL image, class index) without a transform of its own, or has timm's reader of files.
        indices: Which samples.

    Returns:
        The first 64 bits of SHA-256, int64 [len(indices)]; the class of the image is part of what is hashed.
    """
    keys = [hashlib.sha256(_identity(dataset, index)).digest()[:8] for index in indices]
    return torch.from_numpy(np.frombuffer(b''.join(keys), dtype='<i8').astype(np.int64))


def _identity(dataset: Any, index: int) -> bytes:
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples'):  # files, whose folder is their class
        return os.fsencode(os.path.normpath(reader.filename(index, absolute=False)).replace(os.sep, '/'))
    if reader is not None:
        try:
            file, target = reader[index]
        except Exception:  # a sample that cannot be read has no other mark than its place
            return f'number {index}'.encode()
        with file:
            return file.read() + f' {target}'.encode()
    image, target = dataset[index]
    return np.asarray(image).tobytes() + f' {image.size} {image.mode} {target}'.encode()

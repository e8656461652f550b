"""What tells the samples of a data set apart, so that a checkpoint knows which ones it was not trained on."""

import hashlib
import os
from typing import Any, Iterable

import numpy as np
import torch

__all__ = ['probe_keys', 'sample_keys']

PROBE = 64


def sample_keys(dataset: Any, indices: Iterable[int], of_content: bool = False) -> torch.Tensor:
    """A number per sample: of its file's path below the data folder, or, where there are no files, of its content.

    Args:
        dataset: Gives (PIL image, class index) without a transform of its own, or has timm's reader of files.
        indices: Which samples.
        of_content: Whether files are told apart by their content too, not by their paths.

    Returns:
        The first 64 bits of SHA-256, int64 [len(indices)]; the class of the image is part of what is hashed.
    """
    keys = [hashlib.sha256(_identity(dataset, index, of_content)).digest()[:8] for index in indices]
    return torch.from_numpy(np.frombuffer(b''.join(keys), dtype='<i8').astype(np.int64))


def probe_keys(dataset: Any) -> torch.Tensor:
    """Keys of the content of up to 64 samples from everywhere in a data set, to know it again in another place.

    Args:
        dataset: As for `sample_keys`.
    """
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), PROBE)).astype(int).tolist()
    return sample_keys(dataset, indices, of_content=True)


def _identity(dataset: Any, index: int, of_content: bool) -> bytes:
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples') and not of_content:  # files, whose folder is their class
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

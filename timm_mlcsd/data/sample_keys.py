"""Keys that identify the samples of a data set, so that a checkpoint can record which ones were held out."""

import hashlib
import os
from typing import Any, Iterable, Optional, Sequence

import numpy as np
import torch

__all__ = ['probe_keys', 'sample_keys']

PROBE = 64


def sample_keys(dataset: Any, indices: Iterable[int], of_content: bool = False) -> torch.Tensor:
    """Compute a key per sample, from the path of its file below the data folder, or from its content without files.

    Args:
        dataset: Data set of (PIL image, class index) without a transform, or with a timm reader of files.
        indices: Indices of the samples, [N].
        of_content: Whether to use the content of files instead of their paths; default False.

    Returns:
        First 64 bits of the SHA-256 of path or content, int64 [N]. Both include the class: the folder of a file, or
        the class index.
    """
    keys = [hashlib.sha256(_identity(dataset, index, of_content)).digest()[:8] for index in indices]
    return torch.from_numpy(np.frombuffer(b''.join(keys), dtype='<i8').astype(np.int64))


def probe_keys(dataset: Any, indices: Optional[Sequence[int]] = None) -> torch.Tensor:
    """Compute content keys of up to 64 evenly spaced samples, to recognise images that were moved or replaced.

    Args:
        dataset: Data set as for `sample_keys`.
        indices: Indices of the samples, [N]; default None for all.

    Returns:
        Keys, int64 [min(64, N)].
    """
    chosen: Sequence[int] = range(len(dataset)) if indices is None else indices
    places = np.linspace(0, len(chosen) - 1, min(len(chosen), PROBE)).astype(int).tolist()
    return sample_keys(dataset, [chosen[place] for place in places], of_content=True)


def _identity(dataset: Any, index: int, of_content: bool) -> bytes:
    reader: Any = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples') and not of_content:  # files; the path includes the class folder
        return os.fsencode(os.path.normpath(reader.filename(index, absolute=False)).replace(os.sep, '/'))
    if reader is not None:
        try:
            file, target = reader[index]
        except Exception:  # a broken sample can be identified only by its index
            return f'number {index}'.encode()
        with file:
            content: bytes = file.read()
        return content + f' {target}'.encode()
    image, target = dataset[index]
    return np.asarray(image).tobytes() + f' {image.size} {image.mode} {target}'.encode()

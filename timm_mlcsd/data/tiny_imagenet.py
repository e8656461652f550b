"""Unpack the official zip file of Tiny-ImageNet to folders of images.

    python -m timm_mlcsd.data.tiny_imagenet FOLDER              # downloads 248 MB
    python -m timm_mlcsd.data.tiny_imagenet FOLDER --zip FILE

creates ``FOLDER/train`` and ``FOLDER/test`` with one folder per class, for ``./train.py FOLDER`` and
``./validate.py FOLDER --split test``. The published test images have no labels; as is usual, the labelled validation
images are used as the test split.
"""

import argparse
import re
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Tuple

from torchvision.datasets.utils import download_url

__all__ = ['MD5', 'URL', 'unpack']

URL = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'
MD5 = '90528d7ca1a48142e341f4ef8d21d0de'

_TRAIN = re.compile(r'tiny-imagenet-200/train/(n\d{8})/images/(\w+\.JPEG)')
_VAL = re.compile(r'tiny-imagenet-200/val/images/(\w+\.JPEG)')
_LABELS = 'tiny-imagenet-200/val/val_annotations.txt'


def unpack(folder: Path, archive: Optional[Path] = None, url: str = URL, md5: Optional[str] = MD5) -> Dict[str, int]:
    """Create the folder; on any error it is not created.

    Args:
        folder: Folder to create; it must not exist, or be empty.
        archive: Zip file; default None to download it.
        url: Address of the download.
        md5: MD5 checksum of the download; None for no check. A given `archive` is not checked.

    Returns:
        Number of images per split.

    Raises:
        ValueError: The folder is not empty, the download failed, or the file is damaged or not Tiny-ImageNet.
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{str(folder)!r} exists already; remove it, or name another folder.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as temporary:
        if archive is None:
            archive = Path(temporary) / 'download.zip'
            try:
                download_url(url, temporary, archive.name, md5)
            except (OSError, RuntimeError) as e:
                raise ValueError(f'{url} cannot be downloaded: {e}; to use a local file, pass --zip FILE.') from e
        complete = Path(temporary) / 'complete'
        counts = {'train': 0, 'test': 0}
        try:
            with zipfile.ZipFile(archive) as source:
                for split, label, name, member in _images(source):
                    path = complete / split / label / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with source.open(member) as image, open(path, 'wb') as f:
                        shutil.copyfileobj(image, f)
                    counts[split] += 1
        except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError, KeyError, ValueError) as e:
            raise ValueError(f'{str(archive)!r} cannot be read as the zip file of Tiny-ImageNet: {e}') from e
        if not all(counts.values()):
            raise ValueError(f'{str(archive)!r} is not Tiny-ImageNet: it has {counts} labelled images.')
        complete.replace(folder)
    return counts


def _images(source: zipfile.ZipFile) -> Iterator[Tuple[str, str, str, str]]:
    """Yield split, class, file name and zip member of every labelled image."""
    lines = source.read(_LABELS).decode('ascii', 'replace').splitlines()
    labels = dict(line.split('\t')[:2] for line in lines if '\t' in line)
    for member in source.namelist():
        if found := _TRAIN.fullmatch(member):
            yield 'train', found[1], found[2], member
        elif (found := _VAL.fullmatch(member)) and re.fullmatch(r'n\d{8}', labels.get(found[1], '')):
            yield 'test', labels[found[1]], found[1], member


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of ``python -m timm_mlcsd.data.tiny_imagenet``."""
    parser = argparse.ArgumentParser(
        prog='timm_mlcsd.data.tiny_imagenet', description='Unpack Tiny-ImageNet to folders of images.'
    )
    parser.add_argument('folder', type=Path, help='folder to create, with train and test')
    parser.add_argument('--zip', type=Path, metavar='FILE', help='official zip file (default: download it)')
    args = parser.parse_args(argv)
    try:
        counts = unpack(args.folder, args.zip)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(f'{args.folder}: {counts["train"]} training images, {counts["test"]} test images')


if __name__ == '__main__':
    main()

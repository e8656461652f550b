"""Small data sets as streams have them, in Parquet, WebDataset's tar files and TFDS, of whatever bytes."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

SIZES = dict(train=(13, 8, 11, 9), test=(7, 3, 3))  # images in each shard
KEYS = ['--input-key', 'img', '--target-key', 'fine_label']
CLASSES = ['a', 'b', 'c']


def noise():
    """By split and shard, names, encoded images whose top left pixel is their number, and labels."""
    splits = {}
    for split, sizes in SIZES.items():
        random = np.random.default_rng(0)
        numbers = iter(range(sum(sizes)))
        splits[split] = [
            [_sample(f'{i}_{j}', next(numbers), j % 3, random) for j in range(n)] for i, n in enumerate(sizes)
        ]
    return splits


def _sample(name, number, label, random):
    pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    pixels[0, 0, 0] = number
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, 'PNG')
    return name, png.getvalue(), label


def write_parquet(folder, splits):
    import datasets

    # five seconds after every pass otherwise, for threads that may not have ended
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=CLASSES))
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            rows = [dict(img=dict(bytes=data, path=f'{name}.png'), fine_label=label) for name, data, label in shard]
            path = folder / f'{split}-{i:05d}-of-{len(shards):05d}.parquet'
            datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return folder


def write_tars(folder, splits):
    folder.mkdir(exist_ok=True)
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            with tarfile.open(folder / f'tiny-{split}-{i}.tar', 'w') as tar:
                for name, data, label in shard:
                    members = {f'{name}.png': data}
                    if label is not None:
                        members[f'{name}.cls'] = str(label).encode()
                    for member, content in members.items():
                        info = tarfile.TarInfo(member)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    info = {
        split: dict(
            name=split,
            filenames=[f'tiny-{split}-{i}.tar' for i in range(len(shards))],
            shard_lengths=[len(shard) for shard in shards],
            num_samples=sum(map(len, shards)),
        )
        for split, shards in splits.items()
    }
    (folder / '_info.json').write_text(json.dumps(dict(splits=info)))
    return folder


def write_tfds(folder, splits):
    import tensorflow_datasets as tfds

    folder.mkdir()

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')
        pkg_dir_path = folder  # of a description, which there is none of

        def _info(self):
            features = dict(
                image=tfds.features.Image(shape=(None, None, 3)), label=tfds.features.ClassLabel(names=CLASSES)
            )
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(shards) for split, shards in splits.items()}

        def _generate_examples(self, shards):
            for name, data, label in itertools.chain(*shards):
                yield name, dict(image=io.BytesIO(data), label=label)

    Tiny(data_dir=str(folder)).download_and_prepare()
    return folder


def write_stream(kind, folder, splits):
    """Flags that read it, beginning with train.py's path if there is one."""
    if kind == 'hfids':
        write_parquet(folder / 'parquet', splits)
        return [f'--dataset=hfids/{folder / "parquet"}', *KEYS, '--train-num-samples', 41]
    if kind == 'wds':
        pytest.importorskip('webdataset')
        return [write_tars(folder / 'shards', splits), '--dataset', 'wds/', '--num-classes', 3]
    pytest.importorskip('tensorflow_datasets')
    return [write_tfds(folder / 'tfds', splits), '--dataset', 'tfds/tiny']

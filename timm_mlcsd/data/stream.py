"""Streams whose images may be broken: counted over all of a loader's processes, named once, left out."""

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections import Counter
from functools import partial
from io import BytesIO
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set

from PIL import Image
from timm.data import IterableImageDataset

from .._timm import get_field, input_decoders, intercept_open, wds_target_error
from ..errors import one_line
from .checked import BrokenSampleTracker
from .image import convert_image, read_image

__all__ = ['CheckedStream']


class CheckedStream(BrokenSampleTracker, IterableImageDataset):
    """A timm reader's stream without the images that cannot be read.

    In training the stream goes on until it has given as many images as without them.

    Args:
        reader: timm's, of ``hfids``, ``tfds`` or ``wds``, not read from yet.
        source: Which of these.
        mode: PIL mode.
        limit: How many images may be broken.
    """

    def __init__(self, reader: Any, source: str, mode: str, limit: int = 0):
        super().__init__(root=None, reader=reader)
        self.source = source
        self.mode = mode
        self.limit = limit
        # what each broken image is called, and why it is one; to tell them apart over the epochs
        self._found: Dict[str, str] = {}
        self.named: Set[str] = set()
        self._seen: Set[str] = set()
        self._log = _SharedLog()
        intercept_open(reader, self._open)

    def _open(self, open_reader: Callable[[], None]) -> None:
        _PREPARE[self.source](self.reader, open_reader, self.mode, self._leave_out)

    def _leave_out(self, name: str, error: Exception) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._log.add([name, one_line(error, 120)])
        if len(self._seen) > self.limit:
            raise ValueError('too many images are broken')

    @property
    def found(self) -> Dict[str, str]:
        self.merge(dict([line]) for line in self._log.new())
        return self._found

    def merge(self, others: Iterable[Dict[str, str]]) -> None:
        for found in others:
            self._found.update(found)

    def _complaint(self, broken: str) -> str:
        return f'{broken} ({self._found[broken]})'

    def _of(self) -> str:  # its length counts repeats
        return 'images of the stream'


class _SharedLog:
    """A temporary file to which several processes append what one of them reads."""

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix='mlcsd-broken-')
        os.close(handle)
        self.read = 0
        weakref.finalize(self, _remove, self.path, os.getpid())

    def add(self, entry: Any) -> None:
        # one write to the end of a file is never mixed with another's
        with open(self.path, 'ab', buffering=0) as f:
            f.write(json.dumps(entry).encode() + b'\n')

    def new(self) -> List[Any]:
        """What has been added since last asked."""
        if not os.path.exists(self.path):  # somebody tidied up
            self.read = 0
            return []
        with open(self.path, 'rb') as f:
            f.seek(self.read)
            lines = f.read().rpartition(b'\n')[0]
        self.read += len(lines) + 1 if lines else 0
        return [json.loads(line) for line in lines.splitlines()]


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.remove(path)


class _Readable:
    """The samples of a reader whose images can be decoded.

    Args:
        samples: Dictionaries.
        key: Where they have the image, encoded.
        decode: Makes an image of that.
        name: Tells what the image of a sample is called.
        leave_out: Told the names of the broken ones, and what is wrong with them.
        most: So many broken ones in a row are all that there are.
    """

    def __init__(
        self, samples: Any, key: str, decode: Callable, name: Callable, leave_out: Callable, most: float = math.inf
    ):
        self.samples = samples
        self.key = key
        self.decode = decode
        self.name = name
        self.leave_out = leave_out
        self.most = most

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        in_a_row = 0
        names: Counter = Counter()
        for sample in self.samples:
            encoded = get_field(sample, self.key)
            try:
                image = self.decode(encoded)
            except Exception as e:  # decoders fail in as many ways as there are files
                self.leave_out(self.name(sample, encoded, names), e)
                in_a_row += 1
                if in_a_row > self.most:
                    raise ValueError('no image of the stream can be read') from e
                continue
            in_a_row = 0
            # timm looks for a key with a slash at the top first
            yield {**sample, self.key: image}

    def set_epoch(self, epoch: int) -> None:
        self.samples.set_epoch(epoch)


def _prepare_hfids(reader: Any, open_reader: Callable, mode: str, leave_out: Callable) -> None:
    import datasets

    features = reader.builder.info.features
    if features and isinstance(features.get(reader.input_key), datasets.Image):
        features[reader.input_key] = datasets.Image(decode=False)
    open_reader()
    decode_example = datasets.Image().decode_example

    def decode(encoded: Any) -> Image.Image:
        if encoded is None:
            raise ValueError('there is none')
        if isinstance(encoded, dict) and encoded.get('bytes'):
            return read_image(BytesIO(encoded['bytes']), mode)
        return convert_image(decode_example(encoded), mode)  # a path, perhaps on another machine

    def name(sample: Dict[str, Any], encoded: Any, names: Counter) -> str:
        path, data = (
            (encoded['path'], encoded['bytes']) if isinstance(encoded, dict) else (None, repr(encoded).encode())
        )
        called = f'{path or "an image without a name"}, SHA-1 {hashlib.sha1(data or b"").hexdigest()}'
        # a pass has every row once: what looks the same is another
        names[called] += 1
        return called if names[called] == 1 else f'{called}, number {names[called]}'

    reader.ds = _Readable(reader.ds, reader.input_key, decode, name, leave_out)


def _prepare_tfds(reader: Any, open_reader: Callable, mode: str, leave_out: Callable) -> None:
    import tensorflow_datasets as tfds

    def undecoded(decoders: Any) -> Any:
        if isinstance(decoders, dict):
            return {key: undecoded(value) for key, value in decoders.items()}
        return tfds.decode.SkipDecoding()

    def with_ids(*args: Any, read_config: Any, **kwargs: Any) -> Any:
        read_config.add_tfds_id = True
        return type(reader.builder).as_dataset(reader.builder, *args, read_config=read_config, **kwargs)

    def decode(encoded: bytes) -> Image.Image:
        return read_image(BytesIO(encoded), mode)

    input_decoders(reader, undecoded)
    reader.builder.as_dataset = with_ids
    reader.input_img_mode = ''  # or timm would make an image of it
    open_reader()
    # to train on, TFDS repeats its samples without end
    most = reader.num_samples if reader.is_training else math.inf
    reader.ds = _Readable(
        reader.ds, reader.input_key, decode, lambda sample, *_: sample['tfds_id'].decode(), leave_out, most
    )


def _prepare_wds(reader: Any, open_reader: Callable, mode: str, leave_out: Callable) -> None:
    open_reader()
    shards = {os.path.join(reader.root, name) for name in reader.split_info.filenames}

    def broken_shard(error: Exception) -> bool:
        # webdataset asks inside of a shard, and then again with the shard's name; it has none for files of one name
        where = error.args[-1] if error.args else ''
        if where is not None and where not in shards:
            raise error
        why = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        leave_out(f'the rest of {where}' if where else str(why), ValueError(why))
        return True

    def images(decode: Callable, samples: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
        given, keys = 0, reader.input_key.split(';')
        for sample in samples:
            called = f'{sample["__url__"]}/{sample["__key__"]}'
            if not sample.keys() & keys:
                has = ', '.join(key for key in sample if not key.startswith('__'))
                leave_out(called, ValueError(f'it has {has}, and no --input-key {reader.input_key}'))
                continue
            try:
                decoded = decode(sample)
                image = None if decoded is None else convert_image(decoded['jpg'], mode)
            except (TypeError, wds_target_error()):  # the flags' fault, not the sample's
                raise
            except Exception as e:
                leave_out(called, e)
                continue
            if decoded is not None:
                given += 1
                yield dict(image=image, target=decoded['target'])
        if reader.is_training and not given:
            # webdataset would end this process's epoch, and leave the others waiting
            raise ValueError('a process of the loader has no image to read; with fewer --workers each has more shards')

    stages = reader.ds.pipeline
    for stage in stages:
        if 'handler' in getattr(stage, 'kw', {}):
            stage.kw['handler'] = broken_shard
    # timm's last two decode a sample, and give the image its name
    decode = stages[-2].args[0]
    decode.keywords['image_mode'] = ''  # so timm leaves the image as the file has it
    stages[-2:] = [partial(images, decode)]


_PREPARE = dict(hfids=_prepare_hfids, tfds=_prepare_tfds, wds=_prepare_wds)

"""Handle broken images in streams: count them over all worker processes, report each once, and skip them."""

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
    """Stream of a timm reader without the images that cannot be read.

    In training the stream continues until it has returned as many images as it would without broken ones.

    Args:
        reader: timm reader of ``hfids``, ``tfds`` or ``wds``, which has not been opened yet.
        source: Type of the reader: ``hfids``, ``tfds`` or ``wds``.
        mode: PIL mode of the images.
        limit: Number of broken images that are accepted; default 0.

    Attributes:
        needs_labels: Whether an image of ``wds`` without a label is an error; False makes all labels 0. The other
            sources may be told to take any column as the label.
    """

    def __init__(self, reader: Any, source: str, mode: str, limit: int = 0):
        super().__init__(root=None, reader=reader)
        self.needs_labels = True
        self.source = source
        self.mode = mode
        self.limit = limit
        # error by name of the broken image; the names identify images over the epochs
        self._found: Dict[str, str] = {}
        self.named: Set[str] = set()
        self._seen: Set[str] = set()
        self._log = _SharedLog()
        intercept_open(reader, self._open)

    def _open(self, open_reader: Callable[[], None]) -> None:
        prepare: Callable[..., Any] = _PREPARE[self.source]
        if self.source == 'wds':
            prepare = partial(prepare, needs_labels=self.needs_labels)
        prepare(self.reader, open_reader, self.mode, self._leave_out)

    def _leave_out(self, name: str, error: Exception) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._log.add([name, one_line(error, 120)])
        if len(self._seen) > self.limit:
            raise ValueError('too many images are broken')

    @property
    def found(self) -> Dict[str, str]:
        """Errors of all known broken images, by the names of the images."""
        self.merge(dict([line]) for line in self._log.new())
        return self._found

    def merge(self, others: Iterable[Dict[str, str]]) -> None:
        """Include broken images that other processes have `found`; see `BrokenSampleTracker.merge`."""
        for found in others:
            self._found.update(found)

    def describe(self, broken: str) -> str:
        """Describe a broken image; see `BrokenSampleTracker.describe`."""
        return f'{broken} ({self._found[broken]})'

    def _describe_total(self) -> str:  # the length is unknown, as it counts repeated images
        return 'images of the stream'


class _SharedLog:
    """Temporary file to which several processes append entries, and from which one of them reads."""

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix='mlcsd-broken-')
        os.close(handle)
        self.read = 0
        weakref.finalize(self, _remove, self.path, os.getpid())

    def add(self, entry: Any) -> None:
        # a single write in append mode is not interleaved with writes of other processes
        with open(self.path, 'ab', buffering=0) as f:
            f.write(json.dumps(entry).encode() + b'\n')

    def new(self) -> List[Any]:
        """Return the entries added since the last call."""
        if not os.path.exists(self.path):  # temporary files may be cleaned up by the system
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
    """Iterable over the samples of a reader whose images can be decoded.

    Args:
        samples: Iterable of samples, each a dict.
        key: Key of the encoded image in a sample.
        decode: Function from the encoded image to a PIL image.
        name: Function from (sample, encoded image, counts of earlier names) to the name of the image.
        leave_out: Function called with the name and the error of every broken image.
        most: Largest number of broken images in a row before an error is raised; default unlimited.
    """

    def __init__(
        self,
        samples: Any,
        key: str,
        decode: Callable[..., Any],
        name: Callable[..., Any],
        leave_out: Callable[..., Any],
        most: float = math.inf,
    ):
        self.samples = samples
        self.key = key
        self.decode = decode
        self.name = name
        self.leave_out = leave_out
        self.most = most

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        in_a_row = 0
        names: Counter[str] = Counter()
        for sample in self.samples:
            encoded = get_field(sample, self.key)
            try:
                image = self.decode(encoded)
            except Exception as e:  # damaged files raise errors of any type
                self.leave_out(self.name(sample, encoded, names), e)
                in_a_row += 1
                if in_a_row > self.most:
                    raise ValueError('no image of the stream can be read') from e
                continue
            in_a_row = 0
            # timm looks up a key with a slash at the top level first
            yield {**sample, self.key: image}

    def set_epoch(self, epoch: int) -> None:
        self.samples.set_epoch(epoch)


def _prepare_hfids(reader: Any, open_reader: Callable[..., Any], mode: str, leave_out: Callable[..., Any]) -> None:
    import datasets

    open_reader()
    features = reader.ds.features  # of a folder of images, the builder does not know them before
    if features and isinstance(features.get(reader.input_key), datasets.Image):
        reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))
    decode_example = datasets.Image().decode_example

    def decode(encoded: Any) -> Image.Image:
        if encoded is None:
            raise ValueError('there is no image')
        if isinstance(encoded, dict) and encoded.get('bytes'):
            return read_image(BytesIO(encoded['bytes']), mode)
        if isinstance(encoded, dict) and os.path.isfile(encoded.get('path') or ''):
            return read_image(encoded['path'], mode)
        return convert_image(decode_example(encoded), mode)  # a path on another machine

    def name(sample: Dict[str, Any], encoded: Any, names: Counter[str]) -> str:
        path, data = (
            (encoded['path'], encoded['bytes']) if isinstance(encoded, dict) else (None, repr(encoded).encode())
        )
        called = f'{path or "an image without a name"}, SHA-1 {hashlib.sha1(data or b"").hexdigest()}'
        # a pass has every row once, so equal names belong to different rows
        names[called] += 1
        return called if names[called] == 1 else f'{called}, number {names[called]}'

    reader.ds = _Readable(reader.ds, reader.input_key, decode, name, leave_out)


def _prepare_tfds(reader: Any, open_reader: Callable[..., Any], mode: str, leave_out: Callable[..., Any]) -> None:
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
    reader.input_img_mode = ''  # prevents timm from decoding the image
    open_reader()
    # TFDS repeats training samples without end
    most = reader.num_samples if reader.is_training else math.inf
    reader.ds = _Readable(
        reader.ds, reader.input_key, decode, lambda sample, *_: sample['tfds_id'].decode(), leave_out, most
    )


def _prepare_wds(
    reader: Any, open_reader: Callable[..., Any], mode: str, leave_out: Callable[..., Any], needs_labels: bool = True
) -> None:
    open_reader()
    shards = {os.path.join(reader.root, name) for name in reader.split_info.filenames}

    def broken_shard(error: Exception) -> bool:
        # webdataset calls this inside a shard, then again with the shard's name; a duplicate file name has no shard
        where = error.args[-1] if error.args else ''
        if where is not None and where not in shards:
            raise error
        why = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        leave_out(f'the rest of {where}' if where else str(why), ValueError(why))
        return True

    stages = reader.ds.pipeline
    for stage in stages:
        if 'handler' in getattr(stage, 'kw', {}):
            stage.kw['handler'] = broken_shard
    # the last two stages of timm decode a sample and rename its image
    decode = stages[-2].args[0]
    decode.keywords['image_mode'] = ''  # timm then keeps the mode of the file
    if not needs_labels:
        decode.keywords.update(target_key=None, alt_label='')
    stages[-2:] = [partial(_wds_images, reader, decode, mode, leave_out, {} if needs_labels else dict(cls=b'0'))]


def _wds_images(
    reader: Any,
    decode: Callable[..., Any],
    mode: str,
    leave_out: Callable[..., Any],
    label: Dict[str, bytes],
    samples: Iterable[Dict[str, Any]],
) -> Iterator[Dict[str, Any]]:
    """Decoded samples of WebDataset, with the label of all of them if one is given."""
    given, keys = 0, reader.input_key.split(';')
    for sample in samples:
        called = f'{sample["__url__"]}/{sample["__key__"]}'
        if not sample.keys() & keys:
            has = ', '.join(key for key in sample if not key.startswith('__'))
            leave_out(called, ValueError(f'it has {has}, but no --input-key {reader.input_key}'))
            continue
        try:
            decoded = decode({**sample, **label})
            image = None if decoded is None else convert_image(decoded['jpg'], mode)
        except (TypeError, wds_target_error()):  # caused by wrong flags, not by the sample
            raise
        except Exception as e:
            leave_out(called, e)
            continue
        if decoded is not None:
            given += 1
            yield dict(image=image, target=decoded['target'])
    if reader.is_training and not given:
        # webdataset would end the epoch of this process only, and the others would wait for it
        raise ValueError(
            'a worker process of the loader has no image to read; use fewer --workers, so that each has more shards'
        )


_PREPARE = dict(hfids=_prepare_hfids, tfds=_prepare_tfds, wds=_prepare_wds)

"""Run the multi-exit network in this folder; needs numpy and onnxruntime, and Pillow to read image files.

    from runner import AdaptiveModel
    model = AdaptiveModel('.')
    logits, exit_index, cost = model.predict(model.prepare('photo.jpg'))

or, in a terminal: python runner.py photo.jpg
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np
import onnxruntime

__all__ = ['AdaptiveModel', 'Prediction']

# constants up to CROP_MODES, and the functions from read_json to _short_repr, are copies of those in file_checks.py of
# timm_mlcsd; its tests/test_file_checks.py holds them equal
SCORES = ('confidence', 'entropy', 'margin', 'logit_margin', 'patience')
AGGREGATES = ('last', 'mean', 'fitted')
RISKS = ('drop', 'selective', 'disagreement')
POLICY_FORMAT = 'timm_mlcsd exit policy'
MANIFEST_FORMAT = 'timm_mlcsd exported stages'
VERSION = 1
MAX_BYTES = 2**24
# range of temperatures and weights: fits are limited to e^-9..e^9; outside this range float32 logits overflow
SCALE = (1e-4, 1e4)
# scores are at most 1, a number of exits or MAX_LOGIT_MARGIN; numbers below MIN_THRESHOLD round to 0 in float32
MAX_THRESHOLD, MIN_THRESHOLD = 1e9, 1e-30
# the logit margin over impossible classes, and of a single class
MAX_LOGIT_MARGIN = 1e6
# largest side of a resized image before the crop, in pixels
MAX_SIDE = 8192
POLICY = dict(
    thresholds=None,
    score='confidence',
    temperatures=None,
    aggregate='last',
    weights=None,
    exit_names=None,
    weights_digest=None,
    calibration_data=None,
    calibration_images=None,
    certificate=None,
)
SUFFIXES = {'onnx': 'onnx', 'torch': 'pt2'}
# Pillow modes and their channels; the first mode with a given number of channels is the default
IMAGE_MODES = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4, 'CMYK': 4, 'YCbCr': 3, 'HSV': 3}
INTERPOLATIONS = {'nearest': 0, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5, 'lanczos': 1}
CROP_MODES = ('center', 'squash', 'border')
# tags of TIFF files
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
# limits memory: a longer image would be resized to gigabytes before the crop
MAX_ASPECT_RATIO = 256
# timm's defaults for entries that the manifest does not have
DATA_CONFIG = dict(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875, crop_mode='center', interpolation='bicubic'
)

# images that wait in a stream per image of a full stage, by default
WAITING = 4
# images whose answers a stream holds per image that may wait: one rare late image must not delay all later ones
HELD = 16

# log-probabilities of the exits so far, prediction of the last one, and number of consecutive exits with it
_History = Tuple[Tuple[np.ndarray, ...], Optional[np.ndarray], Optional[np.ndarray]]
# images that run through the stages together: the name of each, the state, and the history
_Batch = Tuple[np.ndarray, Sequence[np.ndarray], _History]


class Prediction(NamedTuple):
    """Answers for a batch of B images, in the order of the batch.

    Attributes:
        logits: Logits, [B, C]; their softmax gives the class probabilities.
        exit_index: Index of the exit that answered each image, from 0, [B].
        cost: Multiply-adds spent on each image, [B].
    """

    logits: np.ndarray
    exit_index: np.ndarray
    cost: np.ndarray


class AdaptiveModel:
    """A multi-exit network in which each sample of a batch leaves at the first exit that is sure of it.

    Args:
        folder: Folder with manifest.json and the graphs; default: the folder of this file.
        policy: Exit policy, in the form of the manifest's entry ``policy``; default: the policy of the manifest.
        providers: Execution providers of ONNX Runtime.
        threads: Threads per graph; 0 lets ONNX Runtime choose.

    Raises:
        ValueError: The folder holds no exported network, the policy is invalid or belongs to another network, or this
            ONNX Runtime does not have one of the providers.
    """

    def __init__(
        self,
        folder: Union[str, Path] = Path(__file__).parent,
        policy: Optional[Dict[str, Any]] = None,
        providers: Sequence[str] = ('CPUExecutionProvider',),
        threads: int = 0,
    ):
        folder = Path(folder)
        source = repr(str(folder / 'manifest.json'))
        self.manifest = read_json(folder / 'manifest.json')
        check_manifest(self.manifest, source)
        if self.manifest['kind'] != 'onnx':
            raise ValueError(f'{source}: the stages are for {self.manifest["kind"]}, not for ONNX Runtime.')
        self.stages = self.manifest['stages']
        check_graphs(folder, self.manifest)
        self.policy = check_policy(self.manifest['policy'] if policy is None else policy, 'policy')
        self._check_fit()
        self.thresholds = [*self.policy['thresholds'], -math.inf]
        self.is_on = [t != math.inf for t in self.thresholds]
        for k, stage in enumerate(self.stages):
            if self.is_on[k] and not stage['answers']:
                raise ValueError(f'exit {k} was off in the exported policy; export the network again with this policy.')
        available = onnxruntime.get_available_providers()
        names = [p[0] if isinstance(p, tuple) and p else p for p in providers]
        if isinstance(providers, str) or not names or not all(name in available for name in names):
            raise ValueError(f'providers: expected a list out of {", ".join(available)}, got {_short_repr(providers)}.')
        _check_integer('threads', threads, 0, 1024)
        macs = [s['stage_macs'] + (s['head_macs'] if on else 0) for s, on in zip(self.stages, self.is_on)]
        self.costs = np.cumsum(np.array(macs, dtype=np.float64))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # threads of a finished stage would otherwise spin and slow down the next one
        options.add_session_config_entry('session.force_spinning_stop', '1')
        # stages run one after another, so they can share one pool of memory
        _register_shared_memory()
        options.add_session_config_entry('session.use_env_allocators', '1')
        self.sessions = [
            onnxruntime.InferenceSession(str(folder / stage['file']), options, providers=list(providers))
            for stage in self.stages
        ]
        for k, (session, stage) in enumerate(zip(self.sessions, self.stages)):
            classes = [o.shape[-1] for o in session.get_outputs() if o.name == 'logits']
            if stage['answers'] and classes != [self.manifest['num_classes']]:
                raise ValueError(
                    f'{stage["file"]}: expected logits of {self.manifest["num_classes"]} classes at exit {k}.'
                )
        # skips an exported head whose exit is off
        self._skip_head = onnxruntime.RunOptions()
        self._skip_head.only_execute_path_to_fetches = True

    def _check_fit(self) -> None:
        """Raise a ValueError if the policy belongs to another network."""
        policy, names = self.policy, [stage['exit'] for stage in self.stages]
        if len(policy['thresholds']) != len(names) - 1:
            raise ValueError(f'the policy has {len(policy["thresholds"])} thresholds for {len(names)} exits.')
        if policy['exit_names'] and list(policy['exit_names']) != names:
            raise ValueError(
                f'the policy is for exits at {", ".join(policy["exit_names"])}; the network has them at '
                f'{", ".join(names)}.'
            )
        if policy['weights_digest'] not in (None, self.manifest.get('weights_digest')):
            raise ValueError(
                'the policy was fitted to other weights than those in this folder; fit a policy to these weights, or '
                'remove its "weights_digest" if you know that it fits.'
            )

    def warm_up(self) -> None:
        """Run all stages once on an image of zeros, so that the first prediction does not include set-up time."""
        state: Sequence[np.ndarray] = [np.zeros((1, *self.manifest['data_config']['input_size']), dtype=np.float32)]
        for k in range(len(self.stages)):
            state, _ = self._run(k, state)

    def predict(self, x: np.ndarray) -> Prediction:
        """Classify each image at the first exit whose score reaches its threshold.

        An image does not leave at an exit where its largest logit is not a finite number.

        Args:
            x: Images in float32, preprocessed according to the manifest's ``data_config``, [B, C, H, W].

        Returns:
            Logits, exit indices and costs of the batch.

        Raises:
            ValueError: The images have another size, or the batch is empty.
        """
        x = self._checked(x)
        with np.errstate(over='ignore', invalid='ignore'):  # images without finite logits go to the last exit
            return self._predict(x)

    def predict_stream(
        self, batches: Iterable[np.ndarray], *, batch_size: Optional[int] = None, max_waiting: Optional[int] = None
    ) -> Iterator[Prediction]:
        """Classify batch after batch, and run the remaining images of several batches together.

        Images that do not leave at an exit wait there. As soon as `batch_size` images wait in front of a stage, it runs
        on all of them, so that late stages, too, run on full batches (dynamic rebatching: DREX, arXiv:2512.15705).
        Answers are those of `predict` on the same batch, except for rounding. A batch is answered at the latest when
        16 x `max_waiting` images have come after it.

        Args:
            batches: Batches of images as for `predict`, [B, C, H, W] each; sizes may differ.
            batch_size: Number of waiting images with which a stage runs; default: the size of the first batch.
            max_waiting: Number of images that may wait in front of all stages together; beyond it the stage with the
                most of them runs. Default: 4 x `batch_size`.

        Returns:
            Generator of one `Prediction` per batch, in the order of the batches. An error of `batches` passes through.

        Raises:
            ValueError: `batch_size` or `max_waiting` is not a number of images. When its item is requested: the images
                have another size, or the batch is empty.
        """
        if batch_size is not None:
            _check_integer('batch_size', batch_size, 1, 10**9)
        if max_waiting is not None:
            _check_integer('max_waiting', max_waiting, 0, 10**9)
        return _Stream(self, batch_size, max_waiting).predictions(batches)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """Convert images to float32, and raise a ValueError if they have another size."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        size = tuple(self.manifest['data_config']['input_size'])
        if x.ndim != 4 or not len(x) or x.shape[1:] != size:
            raise ValueError(f'images have shape {x.shape}; expected [B, {str(size)[1:-1]}], B at least 1.')
        return x

    def _predict(self, x: np.ndarray) -> Prediction:
        logits = np.empty((len(x), self.manifest['num_classes']), dtype=np.float32)
        exit_index = np.zeros(len(x), dtype=np.int64)
        batch: _Batch = np.arange(len(x)), [x], ((), None, None)
        for k in range(len(self.stages)):
            batch, left, answer = self._advance(k, batch)
            logits[left], exit_index[left] = answer, k
            if not len(batch[0]):
                break
        return Prediction(logits, exit_index, self.costs[exit_index])

    def _advance(self, k: int, batch: _Batch) -> Tuple[_Batch, np.ndarray, np.ndarray]:
        """Run stage k: the remaining images, the names of those that leave there, [N], and their logits, [N, C]."""
        names, state, history = batch
        state, logits = self._run(k, state)
        if logits is None:
            return (names, state, history), names[:0], np.empty((0, self.manifest['num_classes']), np.float32)
        answer, score, history = self._step(k, logits, history)
        leaves = score >= self.thresholds[k]  # all at the last exit, whose threshold is -inf
        left = names[leaves], answer[leaves]
        count = len(leaves) - len(left[0])
        # move the last remaining rows to the positions of the rows that left
        moves = list(zip((count + np.flatnonzero(~leaves[count:])).tolist(), np.flatnonzero(leaves).tolist()))
        return _map_arrays((names, state, history), functools.partial(_compact, count=count, moves=moves)), *left

    def _run(self, k: int, state: Sequence[np.ndarray]) -> Tuple[Sequence[np.ndarray], Optional[np.ndarray]]:
        stage, inputs = self.stages[k], dict(zip(self.stages[k]['inputs'], state))
        if not self.is_on[k]:
            wanted = [name for name in stage['outputs'] if name != 'logits']
            return self.sessions[k].run(wanted, inputs, self._skip_head), None
        *state, logits = self.sessions[k].run(stage['outputs'], inputs)
        return state, logits

    def _step(self, k: int, logits: np.ndarray, history: _History) -> Tuple[np.ndarray, np.ndarray, _History]:
        """Apply the policy at exit k: the answer as logits [B, C], the score [B] and the history for later exits."""
        policy, (log_probs, last, streak) = self.policy, history
        if policy['temperatures'] is not None:
            logits = logits / np.float32(policy['temperatures'][k])
        if policy['aggregate'] != 'last':
            log_probs = (*log_probs, _log_softmax(logits))
            on = [j for j in range(k + 1) if self.is_on[j]]
            if policy['aggregate'] == 'mean':
                weights = [1 / len(on)] * len(on)
            else:
                row = policy['weights'][k]
                weights = [row[j] * sum(row) / sum(row[i] for i in on) for j in on]
            logits = _log_softmax(sum((np.float32(w) * p for w, p in zip(weights, log_probs)), np.zeros_like(logits)))
        is_number = np.isfinite(logits.max(-1))
        if policy['score'] != 'patience':
            return logits, np.where(is_number, _score(logits, policy['score']), -np.inf), (log_probs, None, None)
        prediction = logits.argmax(-1)
        new_streak = np.ones(len(prediction), dtype=np.int64)
        if last is not None and streak is not None:
            new_streak += np.where(prediction == last, streak, 0)
        new_streak *= is_number
        return logits, np.where(is_number, new_streak, -np.inf), (log_probs, prediction, new_streak)

    def prepare(self, image: Any) -> np.ndarray:
        """Preprocess one image for `predict`, as ``data/preprocess.py`` of the package does.

        Args:
            image: Path of an image file, or Pillow image.

        Returns:
            The image in float32, [1, C, H, W].

        Raises:
            ValueError: The range of the pixel values is unknown, the aspect ratio is too large, or the network takes a
                number of channels that image files do not have.
            OSError: The image cannot be decoded; Pillow's decoders may raise other errors too.
        """
        from PIL import Image

        config = {**DATA_CONFIG, **{name: v for name, v in self.manifest['data_config'].items() if v is not None}}
        channels, *wanted = config['input_size']
        modes = [mode for mode, count in IMAGE_MODES.items() if count == channels]
        if not modes:
            raise ValueError(f'the network takes {channels} channels, which image files do not have; use predict.')
        mode = config.get('input_img_mode', modes[0])
        if isinstance(image, Image.Image):
            image = _oriented(image, mode)
        else:
            with Image.open(image) as file:
                image = _oriented(file, mode)
        mean, std = (_per_channel(config[name], channels) for name in ('mean', 'std'))
        image = _resized(image, wanted, config)
        # padding: the mean colour with crop_mode 'border', otherwise black
        fill = tuple(round(255 * m) for m in mean) if config['crop_mode'] == 'border' else (0,) * channels
        top, left = (round((s - n) / 2) if s > n else -((n - s) // 2) for s, n in zip(image.size[::-1], wanted))
        canvas = Image.new(image.mode, wanted[::-1], fill if channels > 1 else fill[0])
        canvas.paste(image, (-left, -top))
        pixels = np.asarray(canvas).astype(np.float32).reshape(*wanted, channels).transpose(2, 0, 1)
        # same order of operations as timm's loader, so that results are equal bit for bit
        shift, scale = (np.array([255 * v for v in values], np.float32)[:, None, None] for values in (mean, std))
        pixels = (pixels - shift) / scale
        return np.ascontiguousarray(pixels[None])


class _Stream:
    """Batches on their way through the stages of `model`, in front of which images wait for a full batch."""

    def __init__(self, model: AdaptiveModel, batch_size: Optional[int], max_waiting: Optional[int]):
        self.model = model
        self.batch_size = batch_size
        self.max_waiting = max_waiting
        # images in front of each stage, named by [number of the batch in the stream, index in the batch]
        self.waiting: List[List[_Batch]] = [[] for _ in model.stages]
        self.counts = [0] * len(model.stages)
        # logits, exits and number of missing answers of the batches that are not answered in full, by their number
        self.open: Dict[int, Tuple[np.ndarray, np.ndarray, int]] = {}
        self.num_batches = 0

    def predictions(self, batches: Iterable[np.ndarray]) -> Iterator[Prediction]:
        for x in batches:
            yield from self.add(x)
        self._run_all()
        yield from self._pop_complete()

    def add(self, x: np.ndarray) -> List[Prediction]:
        """Take in a batch, run the stages that are due, and return the next answers that are complete."""
        x = self.model._checked(x)
        batch_size = self.batch_size = self.batch_size or len(x)
        max_waiting = WAITING * batch_size if self.max_waiting is None else self.max_waiting
        names = np.stack([np.full(len(x), self.num_batches), np.arange(len(x))], axis=1)
        logits = np.empty((len(x), self.model.manifest['num_classes']), dtype=np.float32)
        self.open[self.num_batches] = logits, np.zeros(len(x), dtype=np.int64), len(x)
        self.num_batches += 1
        self._wait(0, (names, [x], ((), None, None)))
        while True:
            full = [k for k, count in enumerate(self.counts) if count >= batch_size]
            if full:
                self._run_stage(full[0])  # the only one: a full stage runs at once, and fills none but its successor
            elif sum(self.counts) > max_waiting:
                # the fullest loses least by running now; of several, the deepest is nearest to its answers
                self._run_stage(max(range(len(self.counts)), key=lambda k: (self.counts[k], k)))
            else:
                break
        found = self._pop_complete()
        if sum(len(logits) for logits, _, _ in self.open.values()) > HELD * max_waiting:
            self._run_all()
            found += self._pop_complete()
        return found

    def _wait(self, k: int, batch: _Batch) -> None:
        """Put images in front of stage k."""
        self.counts[k] += len(batch[0])
        if self.counts[k] < (self.batch_size or 1):
            # the caller may overwrite its images meanwhile, and a view would keep the rows of those that left
            batch = _map_arrays(batch, np.copy)
        self.waiting[k].append(batch)

    def _run_stage(self, k: int) -> None:
        """Run all images that wait in front of stage k through it."""
        batch = _concatenate(self.waiting[k])
        self.waiting[k], self.counts[k] = [], 0
        with np.errstate(over='ignore', invalid='ignore'):  # images without finite logits go to the last exit
            while not self.model.is_on[k]:
                batch, *_ = self.model._advance(k, batch)
                k += 1  # no sample leaves at an exit that is off, so waiting there would gain nothing
            batch, left, answer = self.model._advance(k, batch)
        for number in np.unique(left[:, 0]).tolist():
            own = left[:, 0] == number
            logits, exit_index, missing = self.open[number]
            logits[left[own, 1]], exit_index[left[own, 1]] = answer[own], k
            self.open[number] = logits, exit_index, missing - int(own.sum())
        if len(batch[0]):
            self._wait(k + 1, batch)

    def _run_all(self) -> None:
        """Run the stages until no image waits: from the first to the last, so that images still meet on their way."""
        for k in range(len(self.counts)):
            if self.counts[k]:
                self._run_stage(k)

    def _pop_complete(self) -> List[Prediction]:
        """Remove the first batches as long as they are answered in full, and return their answers."""
        found = []
        while self.open:
            number, (logits, exit_index, missing) = next(iter(self.open.items()))
            if missing:
                break
            found.append(Prediction(logits, exit_index, self.model.costs[exit_index]))
            del self.open[number]
        return found


@functools.cache
def _register_shared_memory() -> None:
    """Register one pool of CPU memory that all graphs of this process share."""
    cpu = onnxruntime.OrtMemoryInfo(
        'Cpu', onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        # no limit, defaults for the rest
        onnxruntime.create_and_register_allocator(cpu, onnxruntime.OrtArenaCfg(0, -1, -1, -1))
    except Exception as e:  # the runner of another folder may have registered it already
        if 'already' not in str(e):
            raise


def _compact(a: np.ndarray, count: int, moves: Sequence[Tuple[int, int]]) -> np.ndarray:
    """Apply `moves` (from, to) to the rows of an array in place, and return its first `count` rows."""
    for source, gap in moves:
        a[gap] = a[source]
    return a[:count]


def _map_arrays(tree: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Apply a function to all arrays in nested lists and tuples."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    return tree if tree is None else tuple(_map_arrays(t, function) for t in tree)


def _concatenate(trees: Sequence[Any]) -> Any:
    """Concatenate nested lists and tuples of the same structure, array by array, along the batch dimension."""
    if len(trees) == 1 or trees[0] is None:
        return trees[0]
    if isinstance(trees[0], np.ndarray):
        return np.concatenate(trees)
    return tuple(_concatenate(parts) for parts in zip(*trees))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _score(logits: np.ndarray, score: str) -> np.ndarray:
    """Score of logits [B, C], [B]: ``confidence``, ``entropy``, ``margin`` or ``logit_margin``."""
    if score == 'logit_margin':
        if logits.shape[-1] == 1:
            return np.full(len(logits), MAX_LOGIT_MARGIN, dtype=logits.dtype)
        best = np.partition(logits, -2, axis=-1)
        return np.minimum(best[:, -1] - best[:, -2], np.float32(MAX_LOGIT_MARGIN))
    if score == 'confidence':  # the largest exponential is 1
        return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    probs = np.exp(_log_softmax(logits))
    if score == 'entropy':
        logs = np.log(np.where(probs > 0, probs, 1))
        return np.maximum(1 + (probs * logs).sum(-1) / math.log(max(probs.shape[-1], 2)), 0)
    if score == 'margin':
        if probs.shape[-1] == 1:
            return probs[:, 0]
        best = np.partition(probs, -2, axis=-1)
        return best[:, -1] - best[:, -2]
    raise ValueError(f'score: expected a score of logits alone, got {score!r}.')


def _oriented(image: Any, mode: str) -> Any:
    """Convert a Pillow image to another mode, with its EXIF orientation applied and 16 bits scaled to 8."""
    from PIL import Image, ImageOps

    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f'its size is {width}x{height}; expected sides that differ by a factor of at most {MAX_ASPECT_RATIO}; '
            f'crop or split it'
        )
    # Pillow before 11 opens a 16-bit PNG as 32-bit integers
    is_16_bit = image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG')
    if image.mode in ('I', 'F') and not is_16_bit:
        kind = 'integers' if image.mode == 'I' else 'floating point numbers'
        raise ValueError(f'its pixels are 32-bit {kind}, whose range is unknown; save it with 8 or 16 bits per channel')
    # a TIFF file of fewer bits, 12 say, has them in 16, and Pillow inverts 8 bits with 0 for white only
    tags = getattr(image, 'tag_v2', {})
    white, inverted = 2 ** min(tags.get(BITS_PER_SAMPLE, (16,))[0], 16) - 1, tags.get(PHOTOMETRIC) == 0
    if getattr(image, 'filename', ''):
        # Pillow 13 maps a TIFF file that it opened by name into memory with the sides of the upright image
        name, image.filename = image.filename, ''
        image.load()
        image.filename = name
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.minimum(np.asarray(image).astype(np.uint32), white)
        pixels = white - pixels if inverted else pixels
        image = Image.fromarray(((pixels * 255 + white // 2) // white).astype(np.uint8))
    return image.convert(mode)


def _resized(image: Any, wanted: Sequence[int], config: Dict[str, Any]) -> Any:
    """Resize a Pillow image before the crop to `wanted` (height, width), with timm's rounding."""
    height, width = (math.floor(n / config['crop_pct']) for n in wanted)
    w, h = image.size
    if config['crop_mode'] != 'squash':  # keeps the aspect ratio; with 'border' the whole image stays visible
        if config['crop_mode'] == 'center' and height == width:
            width, height = (width, int(height * h / w)) if w <= h else (int(width * w / h), height)
        else:
            ratio = (max if config['crop_mode'] == 'border' else min)(h / height, w / width)
            height, width = round(h / ratio), round(w / ratio)
    return (
        image if (w, h) == (width, height) else image.resize((width, height), INTERPOLATIONS[config['interpolation']])
    )


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    return values if len(values) == channels else [np.mean(values).item()] * channels


# copies of the functions in file_checks.py begin here, see SCORES
def read_json(path: Any) -> Any:
    """Read a JSON file.

    Args:
        path: Path of the file.

    Returns:
        Content of the file.

    Raises:
        ValueError: The file cannot be read, is too large, is not valid JSON, or repeats an entry of an object.
    """

    def reject_duplicates(pairs: List[Any]) -> Dict[str, Any]:
        content = {}
        for name, value in pairs:
            if name in content:
                raise ValueError(f'duplicate entry {_short_repr(name)}')
            content[name] = value
        return content

    def reject_constant(name: str) -> NoReturn:
        raise ValueError(f'{name} is not a number in JSON')

    try:
        with open(path, 'rb') as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f'it has more than {MAX_BYTES} bytes')
        text = data.decode('utf-8-sig')
        return json.loads(text, object_pairs_hook=reject_duplicates, parse_constant=reject_constant)
    except RecursionError:
        raise ValueError(f'{str(path)!r} cannot be read as JSON: it is nested too deeply.') from None
    except (OSError, ValueError) as e:
        raise ValueError(f'{str(path)!r} cannot be read as JSON: {" ".join(str(e).split())[:300]}.') from None


def check_policy(content: Any, source: str) -> Dict[str, Any]:
    """Check the content of a policy file.

    Args:
        content: Content of the file.
        source: Name of the file in error messages.

    Returns:
        All fields of the policy, with defaults for missing ones and inf for the threshold ``off``.

    Raises:
        ValueError: A field is unknown or invalid; the message names source and field.
    """
    _check_format(content, source, POLICY_FORMAT)
    unknown = [_short_repr(name) for name in content if name not in POLICY and name not in ('format', 'version')]
    if unknown:
        raise ValueError(f'{source}: unknown entries: {", ".join(unknown)[:300]}.')
    policy = {name: content.get(name, default) for name, default in POLICY.items()}

    def where(field: str) -> str:
        return f'{source}: {field}'

    thresholds = _check_list(where('thresholds'), policy['thresholds'], 0, 999, 'numbers')
    policy['thresholds'] = [_check_threshold(where(f'thresholds[{k}]'), t) for k, t in enumerate(thresholds)]
    num_exits = len(thresholds) + 1
    _check_choice(where('score'), policy['score'], SCORES)
    _check_choice(where('aggregate'), policy['aggregate'], AGGREGATES)
    if policy['temperatures'] is not None:
        policy['temperatures'] = check_scales(where('temperatures'), policy['temperatures'], num_exits)
    if (policy['aggregate'] == 'fitted') != (policy['weights'] is not None):
        expected = 'the result of fit_weights' if policy['weights'] is None else 'none'
        raise ValueError(f'{source}: weights: expected {expected} with aggregate={policy["aggregate"]!r}.')
    if policy['weights'] is not None:
        rows = _check_list(where('weights'), policy['weights'], num_exits, num_exits)
        policy['weights'] = [check_scales(where(f'weights[{k}]'), row, k + 1) for k, row in enumerate(rows)]
    if policy['exit_names'] is not None:
        names = _check_list(where('exit_names'), policy['exit_names'], num_exits, num_exits)
        policy['exit_names'] = [_check_text(where(f'exit_names[{k}]'), name) for k, name in enumerate(names)]
    _check_digest(where('weights_digest'), policy['weights_digest'])
    if policy['calibration_data'] is not None:
        _check_text(where('calibration_data'), policy['calibration_data'])
    if policy['calibration_images'] is not None:
        _check_integer(where('calibration_images'), policy['calibration_images'], 1, 10**12)
    if policy['certificate'] is not None:
        policy['certificate'] = _check_certificate(where('certificate'), policy['certificate'])
    return policy


def _check_certificate(where: str, certificate: Any) -> Dict[str, Any]:
    """Check what a calibration certified, and return a copy of it."""
    names = ('risk', 'limit', 'confidence', 'images', 'bound', 'digest')
    if not isinstance(certificate, dict) or set(certificate) != set(names):
        _raise_invalid(where, f'an object with {", ".join(names)}', certificate)
    _check_choice(f'{where}.risk', certificate['risk'], RISKS)
    _check_number(f'{where}.limit', certificate['limit'], 0, 100)
    _check_number(f'{where}.confidence', certificate['confidence'], 0.5, 1)
    _check_integer(f'{where}.images', certificate['images'], 1, 10**12)
    _check_text(f'{where}.bound', certificate['bound'])
    _check_digest(f'{where}.digest', certificate['digest'])
    return {name: certificate[name] for name in names}


def check_manifest(manifest: Any, source: str) -> None:
    """Check the manifest of an exported folder.

    Args:
        manifest: Content of manifest.json.
        source: Name of the file in error messages.

    Raises:
        ValueError: An entry is missing or invalid; the message names source and field.
    """
    _check_format(manifest, source, MANIFEST_FORMAT)
    missing = [name for name in ('kind', 'num_classes', 'data_config', 'policy', 'stages') if name not in manifest]
    if missing:
        raise ValueError(f'{source} is broken: it has no {", ".join(missing)}.')
    kind = _check_choice(f'{source}: kind', manifest['kind'], tuple(SUFFIXES))
    num_classes = _check_integer(f'{source}: num_classes', manifest['num_classes'], 1, 10**7)
    check_class_names(manifest.get('class_names'), num_classes, f'{source}: class_names')
    _check_digest(f'{source}: weights_digest', manifest.get('weights_digest'))
    _check_digest(f'{source}: runner_digest', manifest.get('runner_digest'))
    check_data_config(manifest['data_config'], f'{source}: data_config')
    stages = _check_list(f'{source}: stages', manifest['stages'], 1, 1000)
    policy = check_policy(manifest['policy'], f'{source}: policy')
    if len(policy['thresholds']) != len(stages) - 1:
        raise ValueError(f'{source}: policy: {len(policy["thresholds"])} thresholds for {len(stages)} exits.')
    tensors = ['images']
    for k, stage in enumerate(stages):
        tensors = _check_stage(stage, f'{source}: stages[{k}]', f'stage_{k}.{SUFFIXES[kind]}', tensors)
        is_on = k == len(stages) - 1 or policy['thresholds'][k] != math.inf
        if stage['answers'] != is_on:
            _raise_invalid(f'{source}: stages[{k}].answers', f'{is_on}, as in the policy', stage['answers'])
    if policy['weights_digest'] not in (None, manifest.get('weights_digest')):
        raise ValueError(f'{source}: policy: weights_digest: it was fitted to other weights than those in the folder.')


def check_graphs(folder: Any, manifest: Dict[str, Any]) -> None:
    """Check that the graphs of an exported folder are those of its manifest; older folders have no digests.

    Args:
        folder: Folder.
        manifest: Content of its manifest.json, checked by `check_manifest`.

    Raises:
        ValueError: A graph is missing or belongs to another export.
    """
    for stage in manifest['stages']:
        path = Path(folder) / stage['file']
        try:
            found = graph_digest(path)
        except OSError as e:
            raise ValueError(f'{str(path)!r} cannot be read: {e.strerror}; export the network again.') from None
        if stage.get('digest') not in (None, found):
            raise ValueError(f'{str(path)!r} belongs to another export than manifest.json; export the network again.')


def graph_digest(path: Path) -> str:
    """Digest of a graph, with the file of its weights if they are stored beside it: ``sha256:`` and 64 digits."""
    digest = hashlib.sha256()
    beside = path.with_name(f'{path.name}.data')
    for file in [path] + [beside] * beside.is_file():
        with open(file, 'rb') as content:
            while block := content.read(2**20):
                digest.update(block)
    return f'sha256:{digest.hexdigest()}'


def _check_stage(stage: Any, source: str, file: str, inputs: List[str]) -> List[str]:
    """Check one stage of a manifest and return the names of its state outputs."""
    needed = ('file', 'exit', 'answers', 'inputs', 'outputs', 'macs', 'params', 'stage_macs', 'head_macs', 'depth')
    missing = [name for name in needed if not isinstance(stage, dict) or name not in stage]
    if missing:
        raise ValueError(f'{source} is broken: it has no {", ".join(missing)}.')
    _check_choice(f'{source}.file', stage['file'], (file,))
    _check_text(f'{source}.exit', stage['exit'])
    _check_digest(f'{source}.digest', stage.get('digest'))
    for name in needed[5:]:
        _check_integer(f'{source}.{name}', stage[name], 0, 10**18)
    if not isinstance(stage['answers'], bool):
        _raise_invalid(f'{source}.answers', 'true or false', stage['answers'])
    for name in ('inputs', 'outputs'):
        for tensor in _check_list(f'{source}.{name}', stage[name], 1, 1000):
            _check_text(f'{source}.{name}', tensor)
    if list(stage['inputs']) != inputs:
        _raise_invalid(
            f'{source}.inputs', f'the state outputs of the previous stage, {_short_repr(inputs)}', stage['inputs']
        )
    state = [name for name in stage['outputs'] if name != 'logits']
    if list(stage['outputs']) != state + ['logits'] * stage['answers']:
        _raise_invalid(
            f'{source}.outputs', 'logits as the last output if the exit answers, otherwise no logits', stage['outputs']
        )
    return state


def check_class_names(names: Any, num_classes: int, where: str) -> None:
    """Check a list of class names.

    Args:
        names: One name per class, None for a class without a name; or None for no names at all.
        num_classes: Number of classes.
        where: Name of the field in error messages.

    Raises:
        ValueError: The number of names is wrong, or a name is empty or not text.
    """
    if names is None:
        return
    for k, name in enumerate(_check_list(where, names, num_classes, num_classes)):
        if name is not None and not (isinstance(name, str) and name):
            _raise_invalid(f'{where}[{k}]', 'a name, or null for a class without a name', name)


def check_data_config(config: Any, source: str) -> None:
    """Check the preprocessing of images.

    Args:
        config: Preprocessing by name, as returned by timm's ``resolve_data_config``.
        source: Name of the field in error messages.

    Raises:
        ValueError: An entry is out of its range.
    """
    if not isinstance(config, dict):
        _raise_invalid(source, 'an object', config)
    channels, *sides = _check_list(f'{source}.input_size', config.get('input_size'), 3, 3)
    _check_integer(f'{source}.input_size[0]', channels, 1, 1024)
    for side in sides:
        _check_integer(f'{source}.input_size', side, 1, MAX_SIDE)
    for name in ('mean', 'std'):
        if config.get(name) is not None:
            for value in _check_list(f'{source}.{name}', config[name], 1, 1024):
                _check_number(f'{source}.{name}', value, *(SCALE if name == 'std' else (-SCALE[1], SCALE[1])))
    if config.get('crop_pct') is not None:
        _check_number(f'{source}.crop_pct', config['crop_pct'], max(sides) / MAX_SIDE, 2.0)
    for name, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if config.get(name) is not None:
            _check_choice(f'{source}.{name}', config[name], tuple(known))
    if config.get('input_img_mode') is not None:
        modes = tuple(mode for mode, count in IMAGE_MODES.items() if count == channels)
        _check_choice(f'{source}.input_img_mode', config['input_img_mode'], modes)


def check_scales(where: str, values: Any, length: int) -> List[float]:
    """Check temperatures or weights.

    Args:
        where: Name of the field in error messages.
        values: Numbers to check.
        length: Expected number of values.

    Returns:
        The values as floats.

    Raises:
        ValueError: The number of values is wrong, or a value is out of range.
    """
    return [_check_number(where, v, *SCALE) for v in _check_list(where, values, length, length, 'positive numbers')]


def _check_format(content: Any, source: str, format: str) -> None:
    if not isinstance(content, dict):
        _raise_invalid(source, f'an object of format {format!r}', content)
    if not isinstance(content.get('format'), str) or content['format'] != format:
        _raise_invalid(f'{source}: format', repr(format), content.get('format'))
    version = content.get('version')
    if isinstance(version, bool) or not isinstance(version, int) or version != VERSION:
        _raise_invalid(f'{source}: version', f'{VERSION}, the version that this release reads', version)


def _check_digest(where: str, digest: Any) -> None:
    if digest is not None and not (isinstance(digest, str) and re.fullmatch('sha256:[0-9a-f]{64}', digest)):
        _raise_invalid(where, 'sha256: followed by 64 hexadecimal digits', digest)


def _check_threshold(where: str, value: Any) -> float:
    if isinstance(value, str) and value == 'off':
        return math.inf
    number = _check_number(where, value, -MAX_THRESHOLD, MAX_THRESHOLD, ', or \'off\'')
    if 0 < abs(number) < MIN_THRESHOLD:
        _raise_invalid(where, f'0 or an absolute value of at least {MIN_THRESHOLD:g}', value)
    return number


def _check_number(where: str, value: Any, low: float, high: float, more: str = '') -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        _raise_invalid(where, f'a number from {low:g} to {high:g}{more}', value)
    return float(value)


def _check_integer(where: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _raise_invalid(where, f'an integer from {low} to {high}', value)
    return value


def _check_text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 300 or not value.isprintable():
        _raise_invalid(where, 'a text of 1 to 300 printable characters', value)
    return value


def _check_choice(where: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        _raise_invalid(where, f'one of {", ".join(known)}', value)
    return value


def _check_list(where: str, value: Any, low: int, high: int, what: str = 'entries') -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
        _raise_invalid(where, f'a list of {low if low == high else f"{low} to {high}"} {what}', value)
    return value


def _raise_invalid(where: str, expected: str, value: Any) -> NoReturn:
    raise ValueError(f'{where}: expected {expected}, got {_short_repr(value)}.')


def _short_repr(value: Any) -> str:
    """The repr of a value for an error message, limited in length."""
    try:
        text = repr(value)
    except Exception:  # for example an integer of thousands of digits, or a list that contains itself
        text = f'a {type(value).__name__}'
    return text if len(text) <= 100 else f'{text[:100]} ...'


def _printable(text: str) -> str:
    """Text with control characters escaped, so that it is safe to print to a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def _warn(message: Any, *_: Any, **__: Any) -> None:
    print(f'runner.py: warning: {_printable(" ".join(str(message).split()))}', file=sys.stderr)


def _label(model: AdaptiveModel, path: str) -> str:
    """Classify one image file and return the result as one line."""
    if os.path.isdir(path):
        raise ValueError('it is a folder; give the image files in it')
    x = model.prepare(path)
    start = time.perf_counter()
    prediction = model.predict(x)
    milliseconds = 1000 * (time.perf_counter() - start)
    logits, names = prediction.logits[0], model.manifest.get('class_names') or []
    if not np.isfinite(logits.max()):
        raise ValueError('the logits of the network are not finite')
    probs = np.exp(_log_softmax(logits))
    best = [(names[i] if names and names[i] is not None else str(i), probs[i]) for i in probs.argsort()[::-1][:3]]
    labels = ', '.join(f'{_printable(name)} {p:.1%}' for name, p in best)
    return f'{_printable(path)}: {labels} (Ex{prediction.exit_index[0] + 1}, {milliseconds:.1f} ms)'


def _fail(error: Union[Exception, str], what: str = '') -> None:
    text = ' '.join(str(error).split())[:300] or type(error).__name__
    print(f'runner.py: error: {_printable(what + text)}', file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f'runner.py: error: {_printable(message)} (see --help)', file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='runner.py', description='Label images with the multi-exit network in this folder.')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file to label')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Classify image files from the command line.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        Exit code: 0, or 2 if an image or the folder cannot be read.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    paths = _parser().parse_args(argv).images
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _label_all(paths)


def _label_all(paths: Sequence[str]) -> int:
    try:
        import PIL  # noqa: F401

        model = AdaptiveModel()
        model.warm_up()
    except ImportError as e:
        _fail(e, 'reading image files needs Pillow (pip install pillow): ')
        return 2
    except Exception as e:  # broken files can cause any error in ONNX Runtime
        _fail(e)
        return 2
    code = 0
    for path in paths:
        try:
            line = _label(model, path)
        except Exception as e:  # broken images can cause any error in Pillow
            _fail(e, f'{path}: ')
            code = 2
        else:
            print(line, flush=True)
    return code


if __name__ == '__main__':
    try:
        try:
            sys.exit(main())
        finally:
            # Python flushes at its end too, but prints a traceback if that fails
            if sys.stdout is not None:  # it is None if the shell has closed it
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:  # only the output is outside of the handlers in main
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # the reader of the output has closed the pipe
            sys.exit(1)
        _fail(f'the output cannot be written: {e.strerror}')
        sys.exit(2)

"""Run the multi-exit network in this folder; needs numpy and onnxruntime (and Pillow to read image files).

    from runner import AdaptiveModel
    model = AdaptiveModel('.')
    logits, exit_index, cost = model.predict(model.prepare('photo.jpg'))

or, in a terminal: python runner.py photo.jpg
"""

import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import onnxruntime

__all__ = ['AdaptiveModel', 'Prediction']


class Prediction(NamedTuple):
    """What a batch of B images is taken for, in the order in which they came.

    Attributes:
        logits: The answers [B, C]; their softmax is what the policy believes.
        exit_index: The exit that answered each, from 0, [B].
        cost: Multiply-adds spent on each, [B].
    """

    logits: np.ndarray
    exit_index: np.ndarray
    cost: np.ndarray


class AdaptiveModel:
    """A multi-exit network in which each sample of a batch leaves when it is sure.

    Args:
        folder: Where manifest.json and the graphs are.
        policy: When samples leave, as the manifest has it under ``policy``; default: that one.
        providers: Execution providers of ONNX Runtime.
        threads: Threads per graph; 0 lets ONNX Runtime choose.
    """

    def __init__(
        self,
        folder: Union[str, Path] = Path(__file__).parent,
        policy: Optional[dict] = None,
        providers: Sequence[str] = ('CPUExecutionProvider',),
        threads: int = 0,
    ):
        folder = Path(folder)
        self.manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        self.stages = self.manifest['stages']
        self.policy = policy or self.manifest['policy']
        thresholds = [math.inf if t == 'off' else float(t) for t in self.policy['thresholds']]
        if len(thresholds) != len(self.stages) - 1:
            raise ValueError(f'the policy has {len(thresholds)} thresholds for {len(self.stages)} exits.')
        self.thresholds = [*thresholds, -math.inf]
        self.is_on = [t != math.inf for t in self.thresholds]
        for k, stage in enumerate(self.stages):
            if self.is_on[k] and not stage['answers']:
                raise ValueError(f'exit {k} was off in the policy that was exported; export again with this one.')
        own = [s['stage_macs'] + (s['head_macs'] if on else 0) for s, on in zip(self.stages, self.is_on)]
        self.costs = np.cumsum(np.array(own, dtype=np.float64))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # the threads of a stage that has run must not spin while the next one works
        options.add_session_config_entry('session.force_spinning_stop', '1')
        # the stages take turns, so they share what each would keep for itself
        _register_shared_memory()
        options.add_session_config_entry('session.use_env_allocators', '1')
        self.sessions = [
            onnxruntime.InferenceSession(str(folder / Path(stage['file']).name), options, providers=list(providers))
            for stage in self.stages
        ]
        self._only_needed = onnxruntime.RunOptions()
        self._only_needed.only_execute_path_to_fetches = True  # a head that was exported and is off

    def predict(self, x: np.ndarray) -> Prediction:
        """Answer for every image at the first exit that is sure of it.

        Args:
            x: Images [B, C, H, W] in float32, prepared as the manifest says under ``data_config``.
        """
        x = np.ascontiguousarray(x, dtype=np.float32)
        if x.ndim != 4 or not len(x):
            raise ValueError(f'images have shape {x.shape}; expected [B, C, H, W], B at least 1.')
        rows = np.arange(len(x))
        logits = np.empty((len(x), self.manifest['num_classes']), dtype=np.float32)
        exit_index = np.zeros(len(x), dtype=np.int64)
        state, memory = [x], ((), None, None)
        for k, threshold in enumerate(self.thresholds):
            state, z = self._run(k, state)
            if z is None:
                continue
            answer, score, memory = self._answer(k, z, memory)
            leaves = score >= threshold if k < len(self.stages) - 1 else np.ones(len(score), dtype=bool)
            if not leaves.any():
                continue
            logits[rows[leaves]] = answer[leaves]
            exit_index[rows[leaves]] = k
            if leaves.all():
                break
            # the last rows that stay fill the gaps of those that leave
            count = len(rows) - int(leaves.sum())
            moves = list(zip(count + np.flatnonzero(~leaves[count:]), np.flatnonzero(leaves)))
            rows, *state = (_close_up(a, count, moves) for a in (rows, *state))
            log_probs, prediction, agreeing = memory
            memory = (
                tuple(_close_up(p, count, moves) for p in log_probs),
                None if prediction is None else _close_up(prediction, count, moves),
                None if agreeing is None else _close_up(agreeing, count, moves),
            )
        return Prediction(logits, exit_index, self.costs[exit_index])

    def _run(self, k: int, state: List[np.ndarray]) -> Tuple[List[np.ndarray], Optional[np.ndarray]]:
        stage, inputs = self.stages[k], dict(zip(self.stages[k]['inputs'], state))
        if not self.is_on[k]:
            wanted = [name for name in stage['outputs'] if name != 'logits']
            return self.sessions[k].run(wanted, inputs, self._only_needed), None
        *state, logits = self.sessions[k].run(stage['outputs'], inputs)
        return state, logits

    def _answer(self, k: int, logits: np.ndarray, memory: Tuple) -> Tuple[np.ndarray, np.ndarray, Tuple]:
        """What exit k says (logits), how sure it is, and what later exits need of it."""
        policy, (log_probs, last, agreeing) = self.policy, memory
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
            logits = _log_softmax(sum(np.float32(w) * p for w, p in zip(weights, log_probs)))
        if policy['score'] != 'patience':
            return logits, _score(logits, policy['score']), (log_probs, None, None)
        prediction = logits.argmax(-1)
        run = np.ones(len(prediction), dtype=np.int64)
        if last is not None:
            run += np.where(prediction == last, agreeing, 0)
        return logits, run, (log_probs, prediction, run)

    def prepare(self, image: Any) -> np.ndarray:
        """One image file, or Pillow image, as the network wants it: [1, C, H, W]."""
        from PIL import Image, ImageOps

        if not isinstance(image, Image.Image):
            image = Image.open(image)
        config = self.manifest['data_config']
        channels, height, width = config['input_size']
        image = ImageOps.exif_transpose(image).convert({1: 'L', 3: 'RGB', 4: 'RGBA'}[channels])
        method = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3}[config['interpolation']]
        wanted = (width, height)
        size = [math.floor(n / config['crop_pct']) for n in wanted]
        mode = config.get('crop_mode', 'center')
        if mode != 'squash':  # the sides keep their ratio; with 'border' all of the image is inside
            pick = min if mode == 'border' else max
            scale = pick(s / n for s, n in zip(size, image.size))
            whole = math.floor if mode == 'center' and width == height else round
            size = [whole(n * scale + 1e-9) for n in image.size]
        image = image.resize(size, method)
        left, top = (round((s - n) / 2) if s > n else -((n - s) // 2) for s, n in zip(size, wanted))
        fill = tuple(round(255 * m) for m in config['mean'])
        canvas = Image.new(image.mode, wanted, fill if channels > 1 else fill[0])
        canvas.paste(image, (-left, -top))
        pixels = np.asarray(canvas, dtype=np.float32).reshape(height, width, channels) / 255
        pixels = (pixels - np.float32(config['mean'])) / np.float32(config['std'])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


@functools.cache
def _register_shared_memory() -> None:
    """Make one pool of CPU memory for all graphs of this process that ask for it, once."""
    cpu = onnxruntime.OrtMemoryInfo(
        'Cpu', onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        # without a limit, the rest as usual
        onnxruntime.create_and_register_allocator(cpu, onnxruntime.OrtArenaCfg(0, -1, -1, -1))
    except Exception as e:  # another folder's runner was first
        if 'already' not in str(e):
            raise


def _close_up(a: np.ndarray, count: int, moves: Sequence[Tuple[int, int]]) -> np.ndarray:
    """The first `count` rows after `moves` (from, to), within the array."""
    for source, gap in moves:
        a[gap] = a[source]
    return a[:count]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _score(logits: np.ndarray, score: str) -> np.ndarray:
    """How sure logits are, between 0 and 1."""
    if score == 'confidence':  # the largest of the exponentials is 1
        return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    probs = np.exp(_log_softmax(logits))
    if score == 'entropy':
        logs = np.log(np.where(probs > 0, probs, 1))
        return np.maximum(1 + (probs * logs).sum(-1) / math.log(max(probs.shape[-1], 2)), 0)
    if probs.shape[-1] == 1:
        return probs[:, 0]
    best = np.partition(probs, -2, axis=-1)
    return best[:, -1] - best[:, -2]


def main(paths: Sequence[str]) -> None:
    """Label image files."""
    if not paths:
        sys.exit('usage: python runner.py IMAGE...')
    model = AdaptiveModel()
    names = model.manifest['class_names']
    for path in paths:
        x = model.prepare(path)
        start = time.perf_counter()
        prediction = model.predict(x)
        milliseconds = 1000 * (time.perf_counter() - start)
        probs = np.exp(_log_softmax(prediction.logits[0]))
        best = ', '.join(f'{names[i] if names else i} {probs[i]:.1%}' for i in probs.argsort()[::-1][:3])
        print(f'{path}: {best} (Ex{prediction.exit_index[0] + 1}, {milliseconds:.1f} ms)')


if __name__ == '__main__':
    main(sys.argv[1:])

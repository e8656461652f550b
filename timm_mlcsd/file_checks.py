"""How JSON files are read, and what those of a policy and of an exported folder may hold.

Plain Python: the exported runner has the same functions, word for word.
"""

import json
import math
import re
from typing import Any, Dict, List, NoReturn, Sequence

__all__ = [
    'AGGREGATES',
    'MANIFEST_FORMAT',
    'POLICY_FORMAT',
    'SCORES',
    'SUFFIXES',
    'VERSION',
    'check_class_names',
    'check_data_config',
    'check_manifest',
    'check_policy',
    'check_scales',
    'read_json',
]

SCORES = ('confidence', 'entropy', 'margin', 'patience')
AGGREGATES = ('last', 'mean', 'fitted')
POLICY_FORMAT = 'timm_mlcsd exit policy'
MANIFEST_FORMAT = 'timm_mlcsd exported stages'
VERSION = 1
MAX_BYTES = 2**24
# temperatures and weights: what is fitted lies within e^-9 and e^9; beyond, float32 logits overflow
SCALE = (1e-4, 1e4)
# scores are at most 1 or a number of exits; what is smaller than the second rounds to 0 in float32
MAX_THRESHOLD, MIN_THRESHOLD = 1e9, 1e-30
# pixels on a side of an image before it is cropped
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
)
SUFFIXES = {'onnx': 'onnx', 'torch': 'pt2'}
# channels of the modes that an image can be converted to; the first of each number is the default
IMAGE_MODES = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4, 'CMYK': 4, 'YCbCr': 3, 'HSV': 3}
INTERPOLATIONS = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}
CROP_MODES = ('center', 'squash', 'border')


def read_json(path: Any) -> Any:
    """What a JSON file holds; a ValueError names the file and what is wrong with it."""

    def unique(pairs: List) -> Dict[str, Any]:
        content = {}
        for name, value in pairs:
            if name in content:
                raise ValueError(f'the entry {_shown(name)} is there twice')
            content[name] = value
        return content

    def refuse(name: str) -> NoReturn:
        raise ValueError(f'{name} is not a number in JSON')

    try:
        with open(path, 'rb') as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f'it has more than {MAX_BYTES} bytes')
        return json.loads(data.decode('utf-8-sig'), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f'{str(path)!r} cannot be read as JSON: it is nested too deeply.') from None
    except (OSError, ValueError) as e:
        raise ValueError(f'{str(path)!r} cannot be read as JSON: {" ".join(str(e).split())[:300]}.') from None


def check_policy(content: Any, source: str) -> Dict[str, Any]:
    """The fields of a policy with defaults for those left out, ``off`` as inf; a ValueError names source and field."""
    _check_format(content, source, POLICY_FORMAT)
    unknown = [_shown(name) for name in content if name not in POLICY and name not in ('format', 'version')]
    if unknown:
        raise ValueError(f'{source}: unknown entries: {", ".join(unknown)[:300]}.')
    policy = {name: content.get(name, default) for name, default in POLICY.items()}

    def where(field: str) -> str:
        return f'{source}: {field}'

    thresholds = _list(where('thresholds'), policy['thresholds'], 0, 999, 'numbers')
    policy['thresholds'] = [_threshold(where(f'thresholds[{k}]'), t) for k, t in enumerate(thresholds)]
    num_exits = len(thresholds) + 1
    _one_of(where('score'), policy['score'], SCORES)
    _one_of(where('aggregate'), policy['aggregate'], AGGREGATES)
    if policy['temperatures'] is not None:
        policy['temperatures'] = check_scales(where('temperatures'), policy['temperatures'], num_exits)
    if (policy['aggregate'] == 'fitted') != (policy['weights'] is not None):
        expected = 'those that fit_weights gives' if policy['weights'] is None else 'none'
        raise ValueError(f'{source}: weights: expected {expected} with aggregate={policy["aggregate"]!r}.')
    if policy['weights'] is not None:
        rows = _list(where('weights'), policy['weights'], num_exits, num_exits)
        policy['weights'] = [check_scales(where(f'weights[{k}]'), row, k + 1) for k, row in enumerate(rows)]
    if policy['exit_names'] is not None:
        names = _list(where('exit_names'), policy['exit_names'], num_exits, num_exits)
        policy['exit_names'] = [_text(where(f'exit_names[{k}]'), name) for k, name in enumerate(names)]
    _check_digest(where('weights_digest'), policy['weights_digest'])
    if policy['calibration_data'] is not None:
        _text(where('calibration_data'), policy['calibration_data'])
    if policy['calibration_images'] is not None:
        _integer(where('calibration_images'), policy['calibration_images'], 1, 10**12)
    return policy


def check_manifest(manifest: Any, source: str) -> None:
    """Raise a ValueError that names source and field where a folder's manifest isn't one that an export writes."""
    _check_format(manifest, source, MANIFEST_FORMAT)
    missing = [name for name in ('kind', 'num_classes', 'data_config', 'policy', 'stages') if name not in manifest]
    if missing:
        raise ValueError(f'{source} is broken: it has no {", ".join(missing)}.')
    kind = _one_of(f'{source}: kind', manifest['kind'], tuple(SUFFIXES))
    num_classes = _integer(f'{source}: num_classes', manifest['num_classes'], 1, 10**7)
    check_class_names(manifest.get('class_names'), num_classes, f'{source}: class_names')
    _check_digest(f'{source}: weights_digest', manifest.get('weights_digest'))
    _check_digest(f'{source}: runner_digest', manifest.get('runner_digest'))
    check_data_config(manifest['data_config'], f'{source}: data_config')
    stages = _list(f'{source}: stages', manifest['stages'], 1, 1000)
    policy = check_policy(manifest['policy'], f'{source}: policy')
    if len(policy['thresholds']) != len(stages) - 1:
        raise ValueError(f'{source}: policy: {len(policy["thresholds"])} thresholds for {len(stages)} exits.')
    tensors = ['images']
    for k, stage in enumerate(stages):
        tensors = _check_stage(stage, f'{source}: stages[{k}]', f'stage_{k}.{SUFFIXES[kind]}', tensors)
        is_on = k == len(stages) - 1 or policy['thresholds'][k] != math.inf
        if stage['answers'] != is_on:
            _refuse(f'{source}: stages[{k}].answers', f'{is_on}, as the policy has it', stage['answers'])
    if policy['weights_digest'] not in (None, manifest.get('weights_digest')):
        raise ValueError(f'{source}: policy: weights_digest: it was fitted to other weights than those in the folder.')


def _check_stage(stage: Any, source: str, file: str, inputs: List[str]) -> List[str]:
    """The names of the tensors that a stage leaves."""
    needed = ('file', 'exit', 'answers', 'inputs', 'outputs', 'macs', 'params', 'stage_macs', 'head_macs', 'depth')
    missing = [name for name in needed if not isinstance(stage, dict) or name not in stage]
    if missing:
        raise ValueError(f'{source} is broken: it has no {", ".join(missing)}.')
    _one_of(f'{source}.file', stage['file'], (file,))
    _text(f'{source}.exit', stage['exit'])
    for name in needed[5:]:
        _integer(f'{source}.{name}', stage[name], 0, 10**18)
    if not isinstance(stage['answers'], bool):
        _refuse(f'{source}.answers', 'true or false', stage['answers'])
    for name in ('inputs', 'outputs'):
        for tensor in _list(f'{source}.{name}', stage[name], 1, 1000):
            _text(f'{source}.{name}', tensor)
    if list(stage['inputs']) != inputs:
        _refuse(f'{source}.inputs', f'what the stage before leaves, {_shown(inputs)}', stage['inputs'])
    left = [name for name in stage['outputs'] if name != 'logits']
    if list(stage['outputs']) != left + ['logits'] * stage['answers']:
        _refuse(f'{source}.outputs', 'logits at the end where the exit answers, else none', stage['outputs'])
    return left


def check_class_names(names: Any, num_classes: int, where: str) -> None:
    """Raise a ValueError where class names aren't one per class, None for those without."""
    if names is None:
        return
    for k, name in enumerate(_list(where, names, num_classes, num_classes)):
        if name is not None and not (isinstance(name, str) and name):
            _refuse(f'{where}[{k}]', 'a name, or null where the class has none', name)


def check_data_config(config: Any, source: str) -> None:
    """Raise a ValueError where the preprocessing of images has an entry that is out of its range."""
    if not isinstance(config, dict):
        _refuse(source, 'an object', config)
    channels, *sides = _list(f'{source}.input_size', config.get('input_size'), 3, 3)
    _integer(f'{source}.input_size[0]', channels, 1, 1024)
    for side in sides:
        _integer(f'{source}.input_size', side, 1, MAX_SIDE)
    for name in ('mean', 'std'):
        if config.get(name) is not None:
            for value in _list(f'{source}.{name}', config[name], 1, 1024):
                _number(f'{source}.{name}', value, *(SCALE if name == 'std' else (-SCALE[1], SCALE[1])))
    if config.get('crop_pct') is not None:
        _number(f'{source}.crop_pct', config['crop_pct'], max(sides) / MAX_SIDE, 2.0)
    for name, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if config.get(name) is not None:
            _one_of(f'{source}.{name}', config[name], tuple(known))
    if config.get('input_img_mode') is not None:
        fitting = tuple(mode for mode, count in IMAGE_MODES.items() if count == channels)
        _one_of(f'{source}.input_img_mode', config['input_img_mode'], fitting)


def check_scales(where: str, values: Any, length: int) -> List[float]:
    """So many temperatures or weights as floats."""
    return [_number(where, v, *SCALE) for v in _list(where, values, length, length, 'positive numbers')]


def _check_format(content: Any, source: str, format: str) -> None:
    if not isinstance(content, dict):
        _refuse(source, f'an object of format {format!r}', content)
    if not isinstance(content.get('format'), str) or content['format'] != format:
        _refuse(f'{source}: format', repr(format), content.get('format'))
    version = content.get('version')
    if isinstance(version, bool) or not isinstance(version, int) or version != VERSION:
        _refuse(f'{source}: version', f'{VERSION}, which this release reads', version)


def _check_digest(where: str, digest: Any) -> None:
    if digest is not None and not (isinstance(digest, str) and re.fullmatch('sha256:[0-9a-f]{64}', digest)):
        _refuse(where, 'sha256: and 64 hexadecimal digits', digest)


def _threshold(where: str, value: Any) -> float:
    if isinstance(value, str) and value == 'off':
        return math.inf
    number = _number(where, value, -MAX_THRESHOLD, MAX_THRESHOLD, ', or \'off\'')
    if 0 < abs(number) < MIN_THRESHOLD:
        _refuse(where, f'0 or a number of at least {MIN_THRESHOLD:g} in size', value)
    return number


def _number(where: str, value: Any, low: float, high: float, more: str = '') -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        _refuse(where, f'a number from {low:g} to {high:g}{more}', value)
    return float(value)


def _integer(where: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(where, f'an integer from {low} to {high}', value)
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 300 or not value.isprintable():
        _refuse(where, 'a text of 1 to 300 printable characters', value)
    return value


def _one_of(where: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        _refuse(where, f'one of {", ".join(known)}', value)
    return value


def _list(where: str, value: Any, low: int, high: int, what: str = 'entries') -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
        _refuse(where, f'a list of {low if low == high else f"{low} to {high}"} {what}', value)
    return value


def _refuse(where: str, expected: str, value: Any) -> NoReturn:
    raise ValueError(f'{where}: expected {expected}, got {_shown(value)}.')


def _shown(value: Any) -> str:
    """A value in a message, however long or odd it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, a list in itself
        text = f'a {type(value).__name__}'
    return text if len(text) <= 100 else f'{text[:100]} ...'

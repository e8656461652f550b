"""Checks of the JSON files of exit policies and exported folders.

Uses only the standard library: the exported runner contains copies of these functions, word for word.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Sequence

__all__ = [
    'AGGREGATES',
    'MANIFEST_FORMAT',
    'MAX_LOGIT_MARGIN',
    'POLICY_FORMAT',
    'RISKS',
    'SCORES',
    'SUFFIXES',
    'VERSION',
    'check_class_names',
    'check_data_config',
    'check_graphs',
    'check_manifest',
    'check_policy',
    'check_scales',
    'graph_digest',
    'read_json',
]

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

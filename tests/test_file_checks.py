"""What a policy file and a manifest may hold: package and exported runner refuse the same, in the same words."""

import inspect
import json
import math

import pytest

from timm_mlcsd import file_checks
from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.adaptive.export import onnx_runner
from timm_mlcsd.adaptive.exported import read_manifest

POLICY = {'format': 'timm_mlcsd exit policy', 'version': 1, 'thresholds': [0.5, 'off']}
DIGEST = 'sha256:' + 64 * 'a'

GOOD = [
    {},
    {'thresholds': []},
    {'thresholds': [0, -3]},
    {'thresholds': [1e9, 1e-30]},
    {'thresholds': [0.5, 2], 'score': 'patience'},
    {'thresholds': [12.5, 1e6], 'score': 'logit_margin', 'aggregate': 'mean'},
    # the ends of what fit_temperatures and fit_weights give
    {'temperatures': [math.exp(-9), 1, math.exp(9)]},
    {'aggregate': 'fitted', 'weights': [[1], [math.exp(-9), math.exp(9)], [1, 2, 3]]},
    {'aggregate': 'mean', 'score': 'entropy', 'exit_names': ['layer1', 'layer2.0', 'layer4']},
    {'weights_digest': DIGEST, 'calibration_data': 'Bilder für später, val', 'calibration_images': 500},
    {'temperatures': None, 'weights': None, 'exit_names': None, 'weights_digest': None},
]
BAD = [  # changes, the field that the message names
    ({'thresholds': '123'}, 'thresholds'),
    ({'thresholds': 7}, 'thresholds'),
    ({'thresholds': None}, 'thresholds'),
    ({'thresholds': {'0': 0.5}}, 'thresholds'),
    ({'thresholds': ['x', 0.5]}, 'thresholds[0]'),
    ({'thresholds': [0.5, 'Off']}, 'thresholds[1]'),
    ({'thresholds': [True, False]}, 'thresholds[0]'),
    ({'thresholds': [None, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [[0.5], 0.5]}, 'thresholds[0]'),
    ({'thresholds': [math.inf, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [0.5, -math.inf]}, 'thresholds[1]'),
    ({'thresholds': [math.nan, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [1e300, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [5e-324, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [10**400, 0.5]}, 'thresholds[0]'),
    ({'thresholds': [0.5] * 1000}, 'thresholds'),
    ({'score': 'luck'}, 'score'),
    ({'score': None}, 'score'),
    ({'score': ['confidence']}, 'score'),
    ({'aggregate': 'Mean'}, 'aggregate'),
    ({'temperatures': '111'}, 'temperatures'),
    ({'temperatures': [1, 1]}, 'temperatures'),
    ({'temperatures': [1, 1, 1e-40]}, 'temperatures'),
    ({'temperatures': [1, 1e40, 1]}, 'temperatures'),
    ({'temperatures': [1, -1, 1]}, 'temperatures'),
    ({'temperatures': [0, 1, 1]}, 'temperatures'),
    ({'temperatures': [True, True, True]}, 'temperatures'),
    ({'temperatures': [10**400, 1, 1]}, 'temperatures'),
    ({'aggregate': 'fitted'}, 'weights'),
    ({'weights': [[1], [1, 1], [1, 1, 1]]}, 'weights'),
    ({'aggregate': 'fitted', 'weights': [[1], [1], [1]]}, 'weights[1]'),
    ({'aggregate': 'fitted', 'weights': ['1', '11', '111']}, 'weights[0]'),
    ({'aggregate': 'fitted', 'weights': [[1], [1, 1e308], [1, 1, 1]]}, 'weights[1]'),
    ({'aggregate': 'fitted', 'weights': 3}, 'weights'),
    ({'exit_names': 'abc'}, 'exit_names'),
    ({'exit_names': ['a', 'b']}, 'exit_names'),
    ({'exit_names': ['a', 'b', 3]}, 'exit_names[2]'),
    ({'exit_names': ['a', 'b', '\x1b[2J']}, 'exit_names[2]'),
    ({'exit_names': ['a', 'b', 'c\0']}, 'exit_names[2]'),
    ({'weights_digest': 'sha256:abc'}, 'weights_digest'),
    ({'weights_digest': DIGEST + '\n'}, 'weights_digest'),
    ({'calibration_data': ''}, 'calibration_data'),
    ({'calibration_images': True}, 'calibration_images'),
    ({'calibration_images': 10**400}, 'calibration_images'),
    ({'version': True}, 'version'),
    ({'version': 1.0}, 'version'),
    ({'version': '1'}, 'version'),
    ({'version': 2}, 'version'),
    ({'version': None}, 'version'),
    ({'format': 'timm_mlcsd exported stages'}, 'format'),
    ({'format': None}, 'format'),
    ({'treshold': 3}, 'treshold'),
]
FILES = [  # bytes, what the message says
    (b'', 'Expecting value'),
    (b'[1]', "expected an object of format 'timm_mlcsd exit policy', got [1]"),
    (b'7', 'expected an object'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [0.5], "thresholds": [0.9]}', 'duplicate'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [NaN]}', 'NaN is not a number in JSON'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [-Infinity]}', '-Infinity is not a number'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [1e999]}', 'thresholds[0]'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [%s]}' % (b'9' * 400), 'thresholds[0]'),
    (b'{"format": "timm_mlcsd exit policy", "version": 1, "thresholds": [%s]}' % (b'9' * 9000), 'digits'),
    (b'[' * 200_000, 'nested too deeply'),
    (b'{"a":' * 200_000, 'nested too deeply'),
    (b'\xff\xfe{', 'utf-8'),
    (b'{"format": "timm_mlcsd\xe9"}', 'utf-8'),
    (b'\0' * 100, 'cannot be read as JSON'),
    (b' ' * (2**24 + 1), 'more than 16777216 bytes'),
]


def verdict(check, *args):
    try:
        check(*args)
    except ValueError as e:
        return str(e)


def test_good_policies():
    for change in GOOD:
        policy = ExitPolicy.from_dict({**POLICY, **change})
        again = onnx_runner.check_policy(policy.to_dict(), 'policy')
        assert tuple(again['thresholds']) == policy.thresholds
        assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize('change, field', BAD)
def test_bad_policies(change, field, tmp_path):
    content = {**POLICY, **change}
    ours = verdict(ExitPolicy.from_dict, content, 'mine.json')
    assert (
        ours is not None and ours.startswith('mine.json: ') and field in ours and '\n' not in ours and len(ours) < 400
    )
    assert verdict(onnx_runner.check_policy, content, 'mine.json') == ours
    (tmp_path / 'exit_policy.json').write_text(json.dumps(content))
    in_file = verdict(ExitPolicy.load, tmp_path)
    assert in_file is not None and in_file.startswith(repr(str(tmp_path / 'exit_policy.json')))


@pytest.mark.parametrize('data, message', FILES, ids=[str(i) for i in range(len(FILES))])
def test_bad_files(data, message, tmp_path):
    path = tmp_path / 'exit_policy.json'
    path.write_bytes(data)
    source = repr(str(path))
    found = verdict(ExitPolicy.load, path)
    assert found is not None and found.startswith(source) and message in found and len(found) < 500
    assert verdict(lambda: onnx_runner.check_policy(onnx_runner.read_json(path), source)) == found


def test_places_that_are_no_files(tmp_path):
    assert 'there is no such file; calibrate a policy' in verdict(ExitPolicy.load, tmp_path)
    (tmp_path / 'exit_policy.json').mkdir()
    assert 'cannot be read as JSON' in verdict(ExitPolicy.load, tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / 'exit_policy.json').write_text(json.dumps(POLICY), encoding='utf-8-sig')
    assert ExitPolicy.load(tmp_path).thresholds == (0.5, math.inf)


def test_the_runner_has_the_same_checks_word_for_word():
    for name, ours in vars(file_checks).items():
        if inspect.isfunction(ours):
            assert inspect.getsource(getattr(onnx_runner, name)) == inspect.getsource(ours), name
        elif name.isupper():
            assert getattr(onnx_runner, name) == ours, name


def stage(k, last=False, answers=True, **change):
    left = [] if last else [f'state_{k}_0']
    content = dict(file=f'stage_{k}.onnx', exit=f'layer{k}', answers=answers)
    content.update(inputs=['images'] if k == 0 else [f'state_{k - 1}_0'], outputs=left + ['logits'] * answers)
    return dict(content, macs=10 * k + 10, params=5, stage_macs=9, head_macs=1, depth=3, **{}) | change


def manifest():
    return dict(
        format='timm_mlcsd exported stages',
        version=1,
        kind='onnx',
        num_classes=3,
        class_names=['ant', None, 'cat'],
        data_config=dict(
            input_size=[3, 32, 32],
            mean=[0.5] * 3,
            std=[0.2] * 3,
            interpolation='bicubic',
            crop_pct=0.875,
            crop_mode='center',
        ),
        policy=dict(POLICY),
        stages=[stage(0), stage(1, answers=False), stage(2, last=True)],
    )


def put(**change):
    return lambda m: m.update(change)


def config(**change):
    return lambda m: m['data_config'].update(change)


def in_stage(k, **change):
    return lambda m: m['stages'][k].update(change)


def policy(**change):
    return lambda m: m['policy'].update(change)


@pytest.mark.parametrize(
    'change, field',
    [
        (put(format='timm_mlcsd exit policy'), 'format'),
        (put(version=True), 'version'),
        (put(kind='tflite'), 'kind'),
        (put(kind=['onnx']), 'kind'),
        (put(num_classes=True), 'num_classes'),
        (put(num_classes=10**400), 'num_classes'),
        (put(class_names=['a', 'b']), 'class_names'),
        (put(class_names='abc'), 'class_names'),
        (put(class_names=['a', 'b', 3]), 'class_names[2]'),
        (put(class_names=['a', 'b', '']), 'class_names[2]'),
        (put(weights_digest=7), 'weights_digest'),
        (put(runner_digest='x'), 'runner_digest'),
        (put(data_config=None), 'data_config'),
        (config(input_size=[3, 32]), 'input_size'),
        (config(input_size='333'), 'input_size'),
        (config(input_size=[3, 32, 10**9]), 'input_size'),
        (config(input_size=[3, 0, 32]), 'input_size'),
        (config(input_size=[3, 32.0, 32]), 'input_size'),
        (config(crop_pct=0.001), 'crop_pct'),
        (config(crop_pct=-0.5), 'crop_pct'),
        (config(crop_pct=1e9), 'crop_pct'),
        (config(crop_pct=True), 'crop_pct'),
        (config(mean='555'), 'mean'),
        (config(mean=[0.5, 0.5, math.nan]), 'mean'),
        (config(std=[0.2, 0, 0.2]), 'std'),
        (config(std=[0.2, 1e-40, 0.2]), 'std'),
        (config(interpolation='magic'), 'interpolation'),
        (config(crop_mode='rrc'), 'crop_mode'),
        (config(input_img_mode='L'), 'input_img_mode'),
        (config(input_img_mode='I;16'), 'input_img_mode'),
        (policy(score='luck'), 'score'),
        (policy(aggregate='best'), 'aggregate'),
        (policy(temperatures=[1, -1, 1]), 'temperatures'),
        (policy(thresholds=[0.5]), '1 thresholds for 3 exits'),
        (policy(thresholds=[0.5, 0.5]), 'stages[1].answers'),
        (policy(weights_digest=DIGEST), 'weights_digest'),
        (put(policy=[]), 'policy'),
        (put(stages=3), 'stages'),
        (put(stages=[]), 'stages'),
        (put(stages=[{}]), 'policy'),
        (put(stages=[1, 2, 3]), 'stages[0]'),
        (in_stage(1, file='stage_0.onnx'), 'stages[1].file'),
        (in_stage(0, file='../../etc/passwd'), 'stages[0].file'),
        (in_stage(0, file='/etc/passwd'), 'stages[0].file'),
        (in_stage(0, file=['stage_0.onnx']), 'stages[0].file'),
        (in_stage(0, exit='\x1b[2J'), 'stages[0].exit'),
        (in_stage(0, answers=1), 'stages[0].answers'),
        (in_stage(0, outputs=['state_0_0']), 'stages[0].outputs'),
        (in_stage(1, inputs=['images']), 'stages[1].inputs'),
        (in_stage(2, macs=-1), 'stages[2].macs'),
        (in_stage(2, stage_macs=10**400), 'stages[2].stage_macs'),
        (in_stage(2, head_macs='1'), 'stages[2].head_macs'),
        (in_stage(2, depth=1.5), 'stages[2].depth'),
    ],
)
def test_bad_manifests(change, field, tmp_path):
    content = manifest()
    change(content)
    found = verdict(file_checks.check_manifest, content, 'manifest.json')
    assert found is not None and found.startswith('manifest.json') and field in found and len(found) < 400
    assert verdict(onnx_runner.check_manifest, content, 'manifest.json') == found
    (tmp_path / 'manifest.json').write_text(json.dumps(content))
    for read in (read_manifest, onnx_runner.AdaptiveModel):
        assert verdict(read, tmp_path).startswith(repr(str(tmp_path / 'manifest.json')))


@pytest.mark.parametrize('entry', ['kind', 'num_classes', 'data_config', 'policy', 'stages'])
def test_manifests_that_lack_an_entry(entry):
    content = manifest()
    file_checks.check_manifest(content, 'manifest.json')
    del content[entry]
    assert f'it has no {entry}' in verdict(file_checks.check_manifest, content, 'manifest.json')


def test_manifests_that_are_no_json(tmp_path):
    for data in (
        b'{"a":' * 200_000,
        b'{"version": %s}' % (b'9' * 9000),
        b'[]',
        b'\xff',
        b'{"version": 1, "version": 1}',
    ):
        (tmp_path / 'manifest.json').write_bytes(data)
        found = verdict(read_manifest, tmp_path)
        assert found.startswith(repr(str(tmp_path / 'manifest.json')))
        assert verdict(onnx_runner.AdaptiveModel, tmp_path) == found

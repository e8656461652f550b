"""Exported stages answer as the network does, also where there is no PyTorch."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_runtime import images_for, logits_of, make, on_the_edge, spread

from timm_mlcsd.adaptive import AGGREGATES, SCORES, AdaptiveModel, ExitPolicy, evaluate_policy, fit_weights
from timm_mlcsd.adaptive.export import export_stages
from timm_mlcsd.cli.export import main
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.models import weights_digest

FAMILIES = {
    'resnet18': dict(exits=3),
    'mobilenetv2_050': dict(exits=3),
    'test_vit': dict(exits=3),
    'test_convnext': dict(exits=3),
    'swin_tiny_patch4_window7_224': dict(exits=3),
    'test_vit_relpos': dict(exits=2),  # out of the exported graph
}
# float32, other kernels in another order: some roundings of logits that are as large as 10
TOLERANCE = dict(rtol=1e-3, atol=1e-3)


def config_for(images, **kwargs):
    config = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation='bicubic', crop_pct=0.875)
    return dict(config, input_size=tuple(images.shape[1:]), **{'crop_mode': 'center', **kwargs})


def runner_in(folder):
    spec = importlib.util.spec_from_file_location('runner', folder / 'runner.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(folder, format, **kwargs):
    """`predict` of an exported folder, from tensor to tensors."""
    if format == 'torch':
        return AdaptiveModel.from_pretrained(folder, trusted=True, **kwargs).predict
    model = runner_in(folder).AdaptiveModel(folder, **kwargs)
    return lambda x: tuple(map(torch.from_numpy, model.predict(x.numpy())))


@pytest.mark.parametrize('format', ['onnx', 'torch'])
@pytest.mark.parametrize('name', FAMILIES)
def test_exported_stages_answer_as_the_network_does(name, format, tmp_path):
    model = make(name, **FAMILIES[name])
    images = images_for(model, 9)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * (model.num_exits - 1)), seed=5)
    export_stages(model, policy, tmp_path / 'out', format, data_config=config_for(images))
    predict = load(tmp_path / 'out', format)
    expected = AdaptiveModel(model, policy, exit_costs(model, images.shape[1:])).predict(images)
    assert 0 < expected.exit_index.float().mean() < model.num_exits - 1
    for batch in (1, 9):
        parts = [predict(part) for part in images.split(batch)]
        logits, exit_index, cost = (torch.cat(column) for column in zip(*parts))
        assert torch.equal(exit_index, expected.exit_index) and torch.equal(cost, expected.cost)
        torch.testing.assert_close(logits, expected.logits, **TOLERANCE)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """One network in both formats, its third exit off."""
    root = tmp_path_factory.mktemp('exported')
    model = make(exits=4)
    images = images_for(model, 12)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 3), seed=1, off={2})
    for format in ('onnx', 'torch'):
        export_stages(model, policy, root / format, format, data_config=config_for(images), class_names=list('abcde'))
    return root, model, images, policy


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_other_policies_on_the_same_export(small, format):
    root, model, images, _ = small
    logits = logits_of(model, images)
    weights = fit_weights(logits, torch.arange(12) % 5)
    for seed, (score, aggregate) in enumerate(itertools.product(SCORES, AGGREGATES)):
        base = ExitPolicy([0.0] * 3, score, [1.5, 1.2, 1.0, 0.9], aggregate, weights if aggregate == 'fitted' else None)
        off = {2} if seed % 2 else {0, 2}  # exit 0 has a head that must not be asked
        policy = spread(logits, base, seed, off)
        expected = evaluate_policy(logits, torch.zeros(12, dtype=torch.long), range(4), policy)
        given = policy if format == 'torch' else policy.to_dict()
        found = load(root / format, format, policy=given)(images)
        same = (found[1] == expected.exit_index) & (found[0].argmax(-1) == expected.prediction)
        assert same.all() or on_the_edge(logits, policy, same), (score, aggregate)


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_streams(small, format):
    root, model, images, policy = small
    if format == 'torch':
        adaptive, batches = AdaptiveModel.from_pretrained(root / 'torch', trusted=True), images.split(5)
    else:
        adaptive = runner_in(root / 'onnx').AdaptiveModel(root / 'onnx')
        batches = [batch.numpy() for batch in images.split(5)]
    found = list(adaptive.predict_stream(batches, batch_size=4))
    assert [len(exits) for _, exits, _ in found] == [5, 5, 2]
    logits, exit_index, cost = (torch.cat([torch.as_tensor(part) for part in column]) for column in zip(*found))
    expected = AdaptiveModel(model, policy, exit_costs(model, images.shape[1:])).predict(images)
    assert torch.equal(exit_index, expected.exit_index) and torch.equal(cost, expected.cost)
    torch.testing.assert_close(logits, expected.logits, **TOLERANCE)


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_an_exit_without_head_cannot_be_turned_on(small, format):
    root, _, images, policy = small
    policy = policy.with_thresholds([math.inf, math.inf, 0.5])
    with pytest.raises(ValueError, match='exit 2 was off in the exported policy'):
        load(root / format, format, policy=policy if format == 'torch' else policy.to_dict())(images)


def test_the_folder_needs_neither_torch_nor_timm(small, tmp_path):
    root, model, _, policy = small
    Image.new('RGB', (50, 40), (250, 20, 20)).save(tmp_path / 'photo.png')
    blocked = 'import sys; sys.modules.update(torch=None, timm=None, timm_mlcsd=None)'
    code = f'{blocked}; sys.path.insert(0, "."); import runner; sys.exit(runner.main(sys.argv[1:]))'
    run = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'photo.png')], cwd=root / 'onnx', capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    transform = timm.data.create_transform(**config_for(images_for(model, 1)))
    logits, exit_index, _ = AdaptiveModel(model, policy).predict(
        transform(Image.open(tmp_path / 'photo.png')).unsqueeze(0)
    )
    best = 'abcde'[logits.argmax()]
    assert f'photo.png: {best} ' in run.stdout and f'(Ex{exit_index.item() + 1}, ' in run.stdout


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('size', [(60, 41), (24, 90), (33, 32)])
def test_images_are_prepared_as_timm_does(small, crop_mode, size):
    root, _, images, _ = small
    runner = runner_in(root / 'onnx').AdaptiveModel(root / 'onnx')
    config = config_for(images, crop_mode=crop_mode)
    runner.manifest['data_config'] = config
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = timm.data.create_transform(**config)(image)
    # the same pixels in uint8, then one rounding of a float32
    np.testing.assert_allclose(runner.prepare(image)[0], expected.numpy(), atol=1e-5)


def test_manifest(small):
    root, model, _, policy = small
    manifest = json.loads((root / 'onnx' / 'manifest.json').read_text())
    assert [stage['answers'] for stage in manifest['stages']] == [True, True, False, True]
    assert manifest['stages'][2]['outputs'] == ['state_2_0'] and manifest['stages'][3]['inputs'] == ['state_2_0']
    assert manifest['policy'] == policy.to_dict() and manifest['class_names'] == list('abcde')
    assert manifest['data_config']['input_size'] == [3, 32, 32]
    assert manifest['versions']['torch'] == torch.__version__
    backbone = sum(p.numel() for p in model.parameters())
    stored = sum(path.stat().st_size for path in (root / 'onnx').glob('*.onnx'))
    assert stored < 2 * 4 * backbone + 200_000  # each weight once, and the graphs


def test_mistakes(small, tmp_path):
    root, model, images, policy = small
    config = dict(data_config=config_for(images))
    with pytest.raises(ValueError, match="format='tflite' is unknown; choose one of onnx, torch"):
        export_stages(model, policy, tmp_path / 'out', 'tflite')
    with pytest.raises(ValueError, match='3 exits; the network has 4'):
        export_stages(model, ExitPolicy([0.5, 0.5]), tmp_path / 'out', **config)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('keep')
    with pytest.raises(ValueError, match='holds something else than an earlier export; choose a new folder'):
        export_stages(model, policy, tmp_path / 'mine', **config)
    (tmp_path / 'mine' / 'manifest.json').write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match='holds something else'):
        export_stages(model, policy, tmp_path / 'mine', **config)
    assert [p.name for p in tmp_path.iterdir()] == ['mine'] and len(list((tmp_path / 'mine').iterdir())) == 2
    with pytest.raises(ValueError, match=r'the weights are torch.bfloat16; .* call model.float\(\)'):
        export_stages(copy.deepcopy(model).bfloat16(), policy, tmp_path / 'out', **config)
    with pytest.raises(ValueError, match=r'can run code when they are loaded.*trusted=True'):
        AdaptiveModel.from_pretrained(root / 'torch')
    with pytest.raises(ValueError, match='holds stages for onnx; its runner'):
        AdaptiveModel.from_pretrained(root / 'onnx', trusted=True)
    runner = runner_in(root / 'onnx')
    with pytest.raises(ValueError, match='2 thresholds for 4 exits'):
        runner.AdaptiveModel(root / 'onnx', ExitPolicy([0.5, 0.5]).to_dict())
    with pytest.raises(ValueError, match=r'shape \(0, 3, 32, 32\)'):
        runner.AdaptiveModel(root / 'onnx').predict(np.zeros((0, 3, 32, 32)))


def test_hostile_manifests(small, tmp_path):
    root, *_ = small
    shutil.copytree(root / 'torch', tmp_path / 'out')
    manifest = json.loads((root / 'torch' / 'manifest.json').read_text())
    elsewhere = dict(manifest['stages'][0], file='../../etc/stage_0.pt2')
    for wrong in ({}, [], dict(manifest, stages=3), dict(manifest, stages=[{}]), dict(manifest, stages=[elsewhere])):
        (tmp_path / 'out' / 'manifest.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r'manifest\.json.*(expected|broken|thresholds for)'):
            AdaptiveModel.from_pretrained(tmp_path / 'out', trusted=True)


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_policy_and_weights_belong_together(small, format, tmp_path):
    root, model, images, policy = small
    digest = weights_digest(model)
    assert json.loads((root / format / 'manifest.json').read_text())['weights_digest'] == digest
    load(root / format, format, policy=given(policy.for_weights(model), format))(images)
    other = dataclasses.replace(policy, weights_digest=digest[:-4] + '0000')
    with pytest.raises(ValueError, match='fitted to other weights'):
        load(root / format, format, policy=given(other, format))
    with pytest.raises(ValueError, match='fitted to other weights'):
        export_stages(model, other, tmp_path / 'out', format, data_config=config_for(images))
    named = dataclasses.replace(policy, exit_names=list('abcd'))
    with pytest.raises(ValueError, match='for exits at a, b, c, d; the network has them at layer1'):
        load(root / format, format, policy=given(named, format))
    # a folder of an earlier release doesn't say which weights it holds
    shutil.copytree(root / format, tmp_path / 'old')
    manifest = json.loads((root / format / 'manifest.json').read_text())
    del manifest['weights_digest']
    (tmp_path / 'old' / 'manifest.json').write_text(json.dumps(manifest))
    load(tmp_path / 'old', format)(images)
    with pytest.raises(ValueError, match='fitted to other weights'):
        load(tmp_path / 'old', format, policy=given(policy.for_weights(model), format))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_stages_of_two_exports_are_not_mixed(small, format, tmp_path):
    root, model, images, policy = small
    other = tmp_path / 'other'
    shutil.copytree(root / format, other)
    file = 'stage_1.onnx' if format == 'onnx' else 'stage_1.pt2'
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.backbone.layer2[0].conv1.weight.mul_(2)
    export_stages(changed, policy, tmp_path / 'changed', format, data_config=config_for(images))
    shutil.copy(tmp_path / 'changed' / file, other / file)
    with pytest.raises(ValueError, match=rf'{file}. belongs to another export than manifest.json'):
        load(other, format)
    (other / file).unlink()
    with pytest.raises(ValueError, match=rf'{file}. cannot be read: No such file'):
        load(other, format)
    # a folder of an earlier release has no digests
    manifest = json.loads((root / format / 'manifest.json').read_text())
    for stage in manifest['stages']:
        del stage['digest']
    shutil.copy(root / format / file, other / file)
    (other / 'manifest.json').write_text(json.dumps(manifest))
    load(other, format)(images)


def given(policy, format):
    return policy if format == 'torch' else policy.to_dict()


@pytest.fixture
def earlier(small, tmp_path):
    """An earlier export."""
    return shutil.copytree(small[0] / 'onnx', tmp_path / 'earlier')


def contents(folder):
    return {str(p.relative_to(folder)): p.is_dir() or p.read_bytes() for p in folder.rglob('*')}


def add(name, text='mine'):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def named_by_the_manifest(name):
    def change(folder):
        (folder / name).write_text('mine')
        manifest = json.loads((folder / 'manifest.json').read_text())
        manifest['stages'][0]['file'] = name
        (folder / 'manifest.json').write_text(json.dumps(manifest))

    return change


def link(folder):
    (folder / 'stage_9.onnx').symlink_to(folder / 'manifest.json')


@pytest.mark.parametrize(
    'change, culprit',
    [
        (add('notes.txt'), 'notes.txt'),
        (add('stage_1.txt'), 'stage_1.txt'),
        (add('my_stage_1.onnx'), 'my_stage_1.onnx'),
        (add('stage_1.onnx.data.bak'), 'stage_1.onnx.data.bak'),
        (add('.hidden'), '.hidden'),
        (add('photos/ant.png'), 'photos'),
        (add('stage_7.onnx/ant.png'), 'stage_7.onnx'),
        (add('__pycache__/mine.cpython-311.pyc'), '__pycache__'),
        (add('__pycache__/runner.py'), '__pycache__'),
        (named_by_the_manifest('thesis.tex'), 'something else than an earlier export'),
        (named_by_the_manifest('runner.py'), 'something else than an earlier export'),
        (link, 'stage_9.onnx'),
        (add('runner.py', 'print("mine")'), 'was changed after the export'),
    ],
)
def test_what_an_export_did_not_write_stays(small, earlier, change, culprit):
    _, model, images, policy = small
    change(earlier)
    before = contents(earlier)
    with pytest.raises(ValueError, match=re.escape(culprit)):
        export_stages(model, policy, earlier, 'torch', data_config=config_for(images))
    assert contents(earlier) == before and [p.name for p in earlier.parent.iterdir()] == ['earlier']


def test_an_earlier_export_is_replaced_whole(small, earlier, tmp_path):
    _, model, images, policy = small
    add('__pycache__/runner.cpython-311.pyc')(earlier)
    add('stage_3.onnx.data')(earlier)
    (tmp_path / 'link').symlink_to(earlier)
    export_stages(model, policy, tmp_path / 'link', 'torch', data_config=config_for(images))
    assert (tmp_path / 'link').is_symlink()
    assert sorted(contents(earlier)) == ['manifest.json', *(f'stage_{k}.pt2' for k in range(4))]


def test_class_names_and_preprocessing_that_do_not_fit(small, tmp_path):
    _, model, images, policy = small
    for change, message in (
        (dict(class_names=list('abc')), 'class_names: expected a list of 5'),
        (dict(class_names=['a', 'b', 'c', 'd', '']), r'class_names\[4\]'),
        (dict(data_config=config_for(images, crop_pct=0.001)), 'crop_pct'),
    ):
        with pytest.raises(ValueError, match=message):
            export_stages(model, policy, tmp_path / 'out', 'torch', **{'data_config': config_for(images), **change})
    assert not list(tmp_path.iterdir())
    export_stages(
        model,
        policy,
        tmp_path / 'out',
        'torch',
        data_config=dict(input_size=(3, 32, 32)),
        class_names=['a', None, 'c', None, 'e'],
    )
    exported = AdaptiveModel.from_pretrained(tmp_path / 'out', trusted=True).model
    assert exported.class_names == ['a', None, 'c', None, 'e']
    assert exported.data_config['mean'] == list(model.default_cfg['mean'])  # what isn't given is the model's own


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(providers='CPUExecutionProvider'), 'providers: expected a list out of'),
        (dict(providers=[]), 'providers: expected a list'),
        (dict(providers=['NoSuchProvider']), r"providers: .*got \['NoSuchProvider'\]"),
        (dict(threads=-1), 'threads: expected an integer from 0'),
        (dict(threads=True), 'threads: expected an integer'),
        (dict(policy={}), "policy: format: expected 'timm_mlcsd exit policy'"),
        (dict(policy='strict'), 'policy: expected an object'),
    ],
)
def test_arguments_that_the_runner_refuses(small, kwargs, message):
    root, *_ = small
    with pytest.raises(ValueError, match=message):
        runner_in(root / 'onnx').AdaptiveModel(root / 'onnx', **kwargs)


def test_graphs_of_another_number_of_classes(earlier):
    manifest = json.loads((earlier / 'manifest.json').read_text())
    (earlier / 'manifest.json').write_text(json.dumps(dict(manifest, num_classes=7, class_names=None)))
    with pytest.raises(ValueError, match=r'stage_0\.onnx: expected logits of 7 classes at exit 0'):
        runner_in(earlier).AdaptiveModel(earlier)


def test_images_of_another_size(small):
    root, *_ = small
    with pytest.raises(ValueError, match=r'shape \(1, 3, 40, 32\); expected \[B, 3, 32, 32\]'):
        runner_in(root / 'onnx').AdaptiveModel(root / 'onnx').predict(np.zeros((1, 3, 40, 32)))
    with pytest.raises(ValueError, match='the stages are for torch'):
        runner_in(root / 'onnx').AdaptiveModel(root / 'torch')


def test_without_the_extra(small, tmp_path, monkeypatch):
    _, model, _, policy = small
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'needs onnx, onnxscript, onnxruntime: install it from a checkout.*\[onnx\]'):
        export_stages(model, policy, tmp_path / 'out')


def test_numbers_that_are_none(small):
    root, model, images, policy = small
    images = images.clone()
    images[0] = math.nan
    for predict in (load(root / 'onnx', 'onnx'), AdaptiveModel(model, policy).predict):
        logits, exit_index, _ = predict(images)
        assert logits[0].isnan().all() and exit_index[0] == 3 and logits[1:].isfinite().all()


def test_a_wrong_graph_is_noticed_and_nothing_is_left(small, tmp_path, monkeypatch):
    _, model, images, policy = small
    monkeypatch.setattr('timm_mlcsd.adaptive.export.TOLERANCE', -1.0)
    with pytest.raises(ValueError, match='state_0_0 of stage 0 differs by'):
        export_stages(model, policy, tmp_path / 'out', 'torch', data_config=config_for(images))
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    from timm_mlcsd import save_pretrained

    model = make(exits=2)
    save_pretrained(model, tmp_path / 'net', data_config=dict(input_size=(3, 32, 32)))

    def run(*argv):
        try:
            main([str(a) for a in argv])
        except SystemExit as e:
            return e.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    code, error = run(tmp_path / 'net', tmp_path / 'out', '--format', 'torch')
    assert code == 2 and 'has no exit policy beside its weights: make one with validate.py --adaptive' in error
    save_pretrained(model, tmp_path / 'net', data_config=dict(input_size=(3, 32, 32)), policy=ExitPolicy([0.5]))
    for _ in range(2):  # an earlier export is replaced
        code, out = run(tmp_path / 'net', tmp_path / 'out', '--format', 'torch')
        assert code == 0 and 'out: 2 stages, ' in out
    images = images_for(model, 4)
    found = AdaptiveModel.from_pretrained(tmp_path / 'out', trusted=True).predict(images)
    there = AdaptiveModel.from_pretrained(tmp_path / 'net').predict(images)
    assert torch.equal(found.exit_index, there.exit_index) and torch.equal(found.cost, there.cost)
    torch.testing.assert_close(found.logits, there.logits, **TOLERANCE)
    assert run('/nowhere', tmp_path / 'out')[0] == 2
    foreign = ExitPolicy([0.5]).for_weights(make(exits=2, num_classes=4), 'pictures', 12)
    foreign.save(tmp_path / 'net')
    before = contents(tmp_path / 'out')
    code, error = run(tmp_path / 'net', tmp_path / 'out', '--format', 'torch')
    assert (
        code == 2
        and 'data pictures, images 12' in error
        and 'validate.py --adaptive --max-drop P --save-policy' in error
    )
    assert contents(tmp_path / 'out') == before

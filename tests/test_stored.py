"""What a config.json and a checkpoint may say of a network: everything else is refused before it is used."""

import copy
import errno
import json
import logging
import os
import shutil
from collections import Counter

import pytest
import safetensors.torch
import timm
import torch

import timm_mlcsd.files
from timm_mlcsd import create_multi_exit, from_pretrained, save_pretrained
from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.hub import label_names
from timm_mlcsd.stored import check_model_source
from timm_mlcsd.stored_entries import class_list

ARGS = dict(num_classes=3, exits=2, channels=(8, 8, 8, 8), small_input=True)
NAMES = ['ant', 'bee', 'cow']


@pytest.fixture(scope='module')
def model():
    return timm.create_model('mlcsd_resnet18', **ARGS).eval()


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')
    config = dict(input_size=(3, 32, 32))
    save_pretrained(model, path, class_names=NAMES, data_config=config, policy=ExitPolicy([0.5]))
    return path


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'net')
    return tmp_path / 'net'


def change(folder, where, value):
    """Set an entry of the config, ``model_args.exits`` say."""
    config = json.loads((folder / 'config.json').read_text())
    *parts, last = where.split('.')
    entry = config
    for part in parts:
        entry = entry[part]
    entry[last] = value
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    'where, value, message',
    [
        ('global_pool', 'max', "global_pool='max': expected 'avg', as model_args creates the network"),
        ('model_args.global_pool', 'max', "global_pool='avg': expected 'max'"),
        ('num_classes', 5, 'expected equal numbers of classes, got num_classes=5, model_args.num_classes=3'),
        ('model_args.num_classes', 5, 'expected equal numbers of classes'),
        ('pretrained_cfg.num_classes', 5, 'expected equal numbers of classes'),
        ('num_classes', True, 'expected an integer'),
        ('model_args.pretrained_strict', False, 'cannot have this argument'),
        ('model_args.pretrained', True, 'cannot have this argument'),
        ('model_args.pretrained_backbone', True, 'expected false'),
        ('model_args.pretrained_cfg', {'file': '/etc/passwd'}, 'cannot have this argument'),
        ('model_args.pretrained_cfg_overlay', {'file': '/etc/passwd'}, 'cannot have this argument'),
        ('model_args.checkpoint_path', '/etc/passwd', 'cannot have this argument'),
        ('model_args.cache_dir', '/tmp', 'cannot have this argument'),
        ('model_args.features_only', True, 'cannot have this argument'),
        ('model_args.out_indices', [0], 'cannot have this argument'),
        ('model_args.device', 'cuda', 'cannot have this argument'),
        ('model_args.scriptable', True, 'cannot have this argument'),
        ('model_args.channels', [10**9] * 4, 'expected numbers from'),
        ('model_args.channels', [900_000] * 4, 'weights are not those'),
        ('model_args.layers', [100_000] * 4, 'many more layers'),
        ('model_args.layers', [2, 2, 2, 3], 'missing'),
        ('model_args.exits', 1, 'unexpected'),
        ('model_args.img_size', 10**6, 'expected sides'),
        ('model_args.in_chans', 1, 'channels'),
        ('model_args', [], 'by name'),
        ('architecture', 'resnet18', 'begins with mlcsd_'),
        ('architecture', 'hf-hub:someone/net', 'begins with mlcsd_'),
        ('architecture', 'local-dir:/tmp', 'begins with mlcsd_'),
        ('architecture', ['mlcsd_resnet18'], 'begins with mlcsd_'),
        ('pretrained_cfg', None, 'not the config'),
        ('pretrained_cfg.url', 'http://127.0.0.1/x', 'expected none'),
        ('pretrained_cfg.file', '/etc/passwd', 'expected none'),
        ('pretrained_cfg.hf_hub_id', 'someone/net', 'expected none'),
        ('pretrained_cfg.hf_hub_filename', 'evil.bin', 'expected none'),
        ('pretrained_cfg.source', 'url', 'expected none'),
        ('pretrained_cfg.custom_load', 'hf', 'expected none'),
        ('pretrained_cfg.label_offset', 1, 'expected none'),
        ('pretrained_cfg.classifier', 'backbone.layer1.0.conv1', 'expected backbone.fc'),
        ('pretrained_cfg.first_conv', 'backbone.layer1.0.conv1', 'expected backbone.conv1'),
        ('pretrained_cfg.architecture', 'mlcsd_resnet34', 'expected mlcsd_resnet18'),
        ('pretrained_cfg.fixed_input_size', 'no', 'true or false'),
        ('pretrained_cfg.surprise', 1, 'unknown entries'),
        ('pretrained_cfg.crop_pct', 0.001, 'from 0.1 to 2'),
        ('pretrained_cfg.crop_pct', float('nan'), 'cannot be read as JSON'),
        ('pretrained_cfg.crop_pct', '1', 'from 0.1 to 2'),
        ('pretrained_cfg.test_crop_pct', 0, 'from 0.1 to 2'),
        ('pretrained_cfg.input_size', [3, 10**5, 10**5], 'each from 1 to 4096'),
        ('pretrained_cfg.input_size', [3, 32.0, 32], 'each from 1 to 4096'),
        ('pretrained_cfg.input_size', [3, 32], 'channels, height and width'),
        ('pretrained_cfg.std', [0.0, 1.0, 1.0], 'std'),
        ('pretrained_cfg.std', [1.0, 1.0], 'one per channel'),
        ('pretrained_cfg.mean', [1e308, 0, 0], 'mean'),
        ('pretrained_cfg.mean', 'abc', 'one per channel'),
        ('pretrained_cfg.interpolation', 'random', 'expected one of'),
        ('pretrained_cfg.crop_mode', [], 'expected one of'),
        ('label_names', ['ant', 'bee'], '2 names for 3 classes'),
        ('label_names', ['ant', 'bee', 7], 'expected a name'),
        ('label_names', ['ant', 'bee', ' '], 'expected a name'),
        ('label_names', ['ant', 'bee', 'ant'], 'both named'),
        ('label_names', {'3': 'ant'}, 'an index from 0 to 2'),
        ('label_names', {'9' * 400: 'ant'}, 'an index from 0 to 2'),
        ('label_names', {'01': 'ant'}, 'an index from 0 to 2'),
        ('label_names', 'ant', 'expected a list'),
    ],
)
def test_a_config_that_says_more_or_else_is_refused(folder, where, value, message):
    change(folder, where, value)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder)
    assert '\n' not in str(error.value)


def test_crop_is_bounded_together_with_the_size(folder):
    change(folder, 'pretrained_cfg.input_size', [3, 2048, 2048])
    change(folder, 'pretrained_cfg.crop_pct', 0.25)
    with pytest.raises(ValueError, match='at most 4096 pixels a side, got 8192'):
        from_pretrained(folder)


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"num_classes": 3, "num_classes": 3}', 'duplicate entry'),
        ('[' * 100_000, 'nested too deeply'),
        ('{"num_classes": ' + '9' * 5000 + '}', 'cannot be read as JSON'),
        ('null', 'not the config'),
        ('', 'cannot be read as JSON'),
    ],
)
def test_broken_json(folder, text, message):
    (folder / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_weights_that_are_not_the_networks(model, folder):
    weights = model.state_dict()
    first, second = list(weights)[:2]
    for change_of, message in (
        (lambda w: w.pop('heads.0.fc.weight'), "missing: .'heads.0.fc.weight'., 1 in all"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected: .'extra'"),
        (lambda w: w.update({first: torch.zeros(1)}), 'of another shape'),
        (lambda w: w.update({'x.' + second: w.pop(second)}), 'missing.*unexpected'),
    ):
        tensors = {name: t.clone() for name, t in weights.items()}
        change_of(tensors)
        safetensors.torch.save_file(tensors, folder / 'model.safetensors')
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)


def test_other_formats_of_weights_are_not_read(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match=r'no model\.safetensors; weights in other formats are not read'):
        from_pretrained(folder)


def test_new_classifiers_on_purpose(model, folder, caplog):
    caplog.set_level(logging.WARNING)
    new = from_pretrained(folder, num_classes=7)
    assert 'has 3 classes: the classifiers for 7 are new and untrained' in caplog.text
    assert new.num_classes == 7 and label_names(new) is None
    assert torch.equal(new.backbone.conv1.weight, model.backbone.conv1.weight)
    with pytest.raises(ValueError, match='has no weights for'):
        from_pretrained(folder, num_classes=7, exits=4)


@pytest.mark.parametrize('names', [NAMES, ['ant', None, 'cow'], {0: 'ant', 2: 'cow'}, [None] * 3])
def test_names_belong_to_indices(model, tmp_path, names):
    save_pretrained(model, tmp_path / 'a', class_names=names)
    save_pretrained(from_pretrained(tmp_path / 'a'), tmp_path / 'b')
    for folder in (tmp_path / 'a', tmp_path / 'b'):
        assert label_names(from_pretrained(folder)) == class_list(names, 3)
    stored = json.loads((tmp_path / 'a' / 'config.json').read_text()).get('label_names')
    if names == ['ant', None, 'cow']:
        assert stored == {'0': 'ant', '2': 'cow'}


def test_a_policy_of_a_network_in_another_precision(model, tmp_path):
    half = copy.deepcopy(model).half()
    for policy in (ExitPolicy([0.5]), ExitPolicy([0.5]).for_weights(half)):
        with pytest.raises(ValueError, match=r'is in torch\.float16 and is loaded in torch\.float32'):
            save_pretrained(half, tmp_path / 'net', policy=policy)
    assert not (tmp_path / 'net').exists()
    save_pretrained(half, tmp_path / 'net')


def test_a_network_that_would_not_load_again_is_not_saved(tmp_path):
    other = timm.create_model('resnet18', channels=(8, 8, 8, 8), num_classes=3)
    other.default_cfg = dict(other.default_cfg, architecture='mine')
    with pytest.raises(ValueError, match=r'cannot be saved so that it loads again.*mlcsd_mine'):
        save_pretrained(create_multi_exit(other, exits=2), tmp_path / 'net')
    cut = timm.create_model('mlcsd_resnet18', **ARGS)
    cut.register_buffer('extra', torch.zeros(1))
    with pytest.raises(ValueError, match='cannot be saved so that it loads again'):
        save_pretrained(cut, tmp_path / 'net')
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize(
    'arch, args, config, message',
    [
        ('hf-hub:someone/net', {}, {}, 'begins with mlcsd_'),
        ('mlcsd_resnet18', dict(checkpoint_path='/etc/passwd'), {}, 'cannot have this argument'),
        ('mlcsd_resnet18', dict(norm_layer=torch.nn.Identity), {}, 'plain JSON values'),
        ('mlcsd_resnet18', dict(channels=[10**400]), {}, 'expected numbers'),
        ('mlcsd_resnet18', {}, dict(crop_pct=0.001), 'from 0.1 to 2'),
        ('mlcsd_resnet18', {}, dict(transform='evil'), 'unknown entries'),
        ('mlcsd_msdnet', dict(num_blocks=500_000, step=900_000), {}, 'layers|created|weights'),
    ],
)
def test_what_a_checkpoint_may_say(arch, args, config, message):
    with pytest.raises(ValueError, match=message):
        check_model_source(arch, args, config, {'stem.weight': (8, 3, 3, 3)})


def test_a_checkpoint_of_this_network_passes(model):
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    config = timm.data.resolve_data_config(model=model)
    check_model_source('mlcsd_resnet18', ARGS, config, shapes)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('there', [True, False])
@pytest.mark.parametrize('step', range(9))
def test_a_full_disk_changes_nothing(model, folder, monkeypatch, step, there):
    (folder / 'notes.txt').write_text('mine')
    target = folder if there else folder.parent / 'new' / 'net'
    before = content(folder.parent)
    calls = Counter()

    def failing(function):
        def call(*args, **kwargs):
            calls['all'] += 1
            if calls['all'] == step + 1:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, 'replace', failing(os.replace))
    monkeypatch.setattr(timm_mlcsd.files, '_flush', failing(timm_mlcsd.files._flush))
    monkeypatch.setattr(safetensors.torch, 'save_file', failing(safetensors.torch.save_file))
    with pytest.raises(ValueError, match=r'cannot be written: .*No space left on device; nothing in it was changed'):
        save_pretrained(model, target, class_names=['x', 'y', 'z'], policy=ExitPolicy([0.9]))
    assert content(folder.parent) == before and (there or not target.parent.exists())


def test_cards_that_others_wrote_or_changed_stay(model, folder, caplog):
    caplog.set_level(logging.WARNING)
    save_pretrained(model, folder, license='mit')
    assert 'license: mit' in (folder / 'README.md').read_text() and 'is kept' not in caplog.text
    for text in ('mine', (folder / 'README.md').read_text().replace('mit', 'other')):
        (folder / 'README.md').write_text(text)
        save_pretrained(model, folder)
        assert (folder / 'README.md').read_text() == text and 'README.md is kept' in caplog.text


def test_a_policy_is_bound_to_the_weights(model, folder):
    policy = ExitPolicy.load(folder)
    policy.check_weights(from_pretrained(folder))
    other = timm.create_model('mlcsd_resnet18', **ARGS)
    with pytest.raises(ValueError, match='other weights'):
        save_pretrained(other, folder, policy=policy)
    assert ExitPolicy.load(folder) == policy
    save_pretrained(other, folder)
    assert not (folder / 'exit_policy.json').exists()


def test_places_that_are_not_for_networks(model, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').write_text('mine')
    for place, message in (
        ('file', 'is not a folder'),
        ('file/net', 'cannot be written'),
        ('run', 'holds checkpoints'),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, tmp_path / place)
    assert (tmp_path / 'file').read_text() == 'mine' and len(list((tmp_path / 'run').iterdir())) == 1

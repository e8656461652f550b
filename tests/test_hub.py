"""To a folder and to the Hub, and back: the same network, bit for bit."""

import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import hub_server
from PIL import Image

from timm_mlcsd import create_multi_exit, from_pretrained, save_pretrained
from timm_mlcsd.data import Preprocessing
from timm_mlcsd.models import create_model

NARROW = dict(channels=(8, 8, 8, 8), small_input=True)


def same_answers(a, b, images):
    with torch.no_grad():
        outputs = [model.eval().forward_exits(images).logits for model in (a, b)]
    return len(outputs[0]) == len(outputs[1]) and all(torch.equal(z, y) for z, y in zip(*outputs))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('resnet18', dict(NARROW, exits=4, exit_head='slic', exit_pool='avg', in_chans=1)),
        ('resnet18', dict(channels=(8, 8, 8, 8), exits=['layer1.0', 'layer3'])),
        ('test_vit', dict(img_size=(160, 96))),
        ('coat_tiny', dict(exits=3)),  # a module in two places
    ],
)
def test_folder_rebuilds_the_same_network(name, kwargs, tmp_path):
    model = timm.create_model(f'mlcsd_{name}', num_classes=3, **kwargs)
    data_config = dict(input_size=model.probe_size, mean=(0.4,) * model.in_chans, std=(0.2,) * model.in_chans)
    save_pretrained(model, tmp_path, class_names=['ant', 'bee', 'cow'], data_config=data_config)
    assert {p.name for p in tmp_path.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    again = from_pretrained(tmp_path)
    assert not again.training and again.exit_args == model.exit_args
    assert same_answers(model, again, torch.randn(2, *model.probe_size))
    assert again.pretrained_cfg['label_names'] == ['ant', 'bee', 'cow']
    config = timm.data.resolve_data_config(model=again)
    assert config['mean'] == [0.4] * model.in_chans and tuple(config['input_size']) == model.probe_size


@pytest.mark.parametrize('name, kwargs', [('mlcsd_test_resnet', dict(exits=3)), ('mlcsd_msdnet', {})])
def test_new_classifiers_have_no_names(name, kwargs, tmp_path):
    save_pretrained(
        timm.create_model(name, num_classes=3, **kwargs), tmp_path / 'old', class_names=['ant', 'bee', 'cow']
    )
    model = from_pretrained(tmp_path / 'old')
    model.reset_classifier(3)
    save_pretrained(model, tmp_path / 'new')
    assert 'label_names' not in json.loads((tmp_path / 'new' / 'config.json').read_text())


def test_a_backbone_that_was_made_first(tmp_path):
    plain = timm.create_model('resnet18', channels=(8, 16, 24, 32), num_classes=7)
    model = create_multi_exit(plain, exits=4)
    save_pretrained(model, tmp_path)
    assert same_answers(model, from_pretrained(tmp_path), torch.randn(2, 3, 64, 64))


def test_stored_pretrained_backbone_is_not_downloaded_again(tmp_path, monkeypatch):
    model = timm.create_model('mlcsd_resnet18', exits=4, num_classes=2, **NARROW)
    model._model_args['pretrained_backbone'] = True
    save_pretrained(model, tmp_path)
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', lambda *_, **__: pytest.fail('a download'))
    assert same_answers(model, from_pretrained(tmp_path), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    'name, kwargs', [('resnet18', dict(in_chans=1, channels=(8, 8, 8, 8))), ('test_vit', dict(img_size=(160, 96)))]
)
def test_preprocessing_of_its_own(name, kwargs, tmp_path):
    model = timm.create_model(f'mlcsd_{name}', num_classes=3, exits=3, **kwargs)
    save_pretrained(model, tmp_path)
    config = timm.data.resolve_data_config(model=from_pretrained(tmp_path))
    assert tuple(config['input_size']) == model.probe_size and len(config['mean']) == model.in_chans


def test_pool_as_it_is_now(tmp_path):
    model = timm.create_model('mlcsd_resnet18', exits=2, **NARROW)
    model.reset_classifier(3, 'max')
    save_pretrained(model, tmp_path)
    assert same_answers(model, from_pretrained(tmp_path), torch.randn(2, 3, 32, 32))


def test_broken_folders(tmp_path):
    save_pretrained(timm.create_model('mlcsd_resnet18', exits=2, num_classes=3, **NARROW), tmp_path)
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be loaded'):
        from_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='cannot be loaded'):
        from_pretrained(tmp_path)


def test_nothing_is_written_for_wrong_results(tmp_path):
    model = timm.create_model('mlcsd_resnet18', exits=2, num_classes=3, **NARROW)
    with pytest.raises(ValueError, match='results: expected 2 entries, one per exit, got 1'):
        save_pretrained(model, tmp_path / 'new', results=[dict(top1=1.0)])
    assert not (tmp_path / 'new').exists()


def test_wrong_class_names(tmp_path):
    model = timm.create_model('mlcsd_resnet18', exits=4, num_classes=2, **NARROW)
    with pytest.raises(ValueError, match='class_names has 1 names for 2 classes'):
        save_pretrained(model, tmp_path, class_names=['one'])


@pytest.mark.parametrize(
    'source, message', [('/nowhere', 'expected a folder with a config.json'), ('hf-hub:a/b/c/d', 'Repo id must be')]
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(source)


def test_card_says_what_the_exits_cost_and_its_code_runs(tmp_path, monkeypatch):
    model = timm.create_model('mlcsd_resnet18', exits=2, num_classes=2, **NARROW)
    results = [dict(top1=81.25), dict(top1=90.0)]
    config = dict(input_size=(3, 32, 32))
    save_pretrained(
        model, tmp_path, results=results, measured_on='ten images', training=dict(lr=0.1), data_config=config
    )
    card = (tmp_path / 'README.md').read_text()
    assert 'library_name: timm\n' in card and '- timm_mlcsd\n' in card
    assert re.search(r'\| Ex1 \| `layer\d.\d` \| 81.25 \| \d+\.\d\d \|', card) and 'Top-1 on ten images.' in card
    assert '| `lr` | `0.1` |' in card
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL).group(1)
    pixels = torch.randint(256, (50, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / 'photo.jpg', exif=exif)
    monkeypatch.chdir(tmp_path)
    code += "\ntorch.save(image, 'image.pt')"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and 'exit 1: class' in run.stdout, run.stderr
    # the reference normalises after it converts to 0 to 1, so float32 rounds differently
    expected = Preprocessing(timm.data.resolve_data_config(model=timm.create_model(f'local-dir:{tmp_path}')))
    assert torch.allclose(torch.load('image.pt'), expected('photo.jpg'), atol=1e-5)


@pytest.mark.parametrize('channels, line', [(1, "read_image('photo.jpg', 'L')"), (5, 'torch.zeros(1, *(5, 32, 32))')])
def test_model_card_of_other_images(tmp_path, channels, line):
    model = timm.create_model('mlcsd_test_resnet', exits=2, num_classes=2, in_chans=channels)
    save_pretrained(model, tmp_path, data_config=dict(input_size=(channels, 32, 32)))
    assert line in (tmp_path / 'README.md').read_text()


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    save_pretrained(timm.create_model('mlcsd_test_resnet', exits=2, num_classes=2), tmp_path)
    assert len({(tmp_path / name).stat().st_mode for name in ('config.json', 'README.md', 'model.safetensors')}) == 1


SESSION = """
import sys, timm, torch, timm_mlcsd
from timm_mlcsd import push_to_hub
torch.manual_seed(0)
model = timm.create_model('mlcsd_resnet18', exits=4, num_classes=2, channels=(8, 8, 8, 8), small_input=True).eval()
names, branch = ['cat', 'dog'], sys.argv[1] or None
if branch is None:
    from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy
    policy = ExitPolicy([0.9, 0.8, float('inf')], exit_names=model.exit_names)
    push_to_hub(model, 'me/small', private=True, policy=policy, token='hf_' + 'x' * 34)
    adaptive = AdaptiveModel.from_pretrained('hf-hub:me/small')
    assert adaptive.policy == policy.for_weights(model)
    assert adaptive.predict(torch.randn(2, 3, 32, 32)).logits.shape == (2, 2)
address = push_to_hub(model, 'me/small', private=True, revision=branch, class_names=names, token='hf_' + 'x' * 34)
assert '/me/small/' in address, address
again = timm.create_model('hf-hub:me/small', pretrained=True).eval()
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    assert all(torch.equal(z, y) for z, y in zip(model.forward_exits(x).logits, again.forward_exits(x).logits))
assert again.pretrained_cfg['label_names'] == ['cat', 'dog']
"""


@pytest.fixture
def hub(tmp_path):
    with hub_server() as server:
        environment = dict(os.environ, HF_ENDPOINT=server.address, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0')
        environment.update(HF_TOKEN='hf_' + 'x' * 34, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
        yield server, environment


@pytest.mark.parametrize('branch', ['', 'epoch-9'])
def test_real_client_pushes_and_pulls(hub, branch):
    server, environment = hub
    run = subprocess.run(
        [sys.executable, '-c', SESSION, branch], env=environment, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0, run.stderr
    repo = server.repos['me/small']
    assert repo['private']
    # the policy that was there belonged to other weights
    assert set(repo['files']) == {'config.json', 'model.safetensors', 'README.md'}
    assert "timm.create_model('hf-hub:me/small'" in repo['files']['README.md'].decode()
    assert json.loads(repo['files']['config.json'])['architecture'] == 'mlcsd_resnet18'


def test_a_card_that_is_there_stays(hub):
    server, environment = hub
    server.repos['me/small'] = dict(files={'README.md': b'mine'}, private=True)
    branch = ''
    run = subprocess.run(
        [sys.executable, '-c', SESSION, branch], env=environment, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0, run.stderr
    assert server.repos['me/small']['files']['README.md'] == b'mine'


class Hostile:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


def test_code_in_a_checkpoint_never_runs(tmp_path, hub, capsys):
    from timm_mlcsd.cli import predict, train, validate

    trap = tmp_path / 'trap'
    model = timm.create_model('mlcsd_resnet18', exits=4, num_classes=2, **NARROW)
    path = tmp_path / 'hostile.pth.tar'
    torch.save(dict(state_dict=model.state_dict(), evil=Hostile(trap)), path)
    for main, argv in (
        (validate.main, ['--checkpoint', str(path)]),
        (predict.main, [str(path), 'photo.jpg']),
        (train.main, [str(tmp_path), '--resume', str(path)]),
    ):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2 and 'cannot be read as a checkpoint' in capsys.readouterr().err
    with pytest.raises(Exception, match=r'[Ww]eights'):
        timm.create_model('mlcsd_resnet18', exits=4, num_classes=2, checkpoint_path=str(path), **NARROW)

    folder = tmp_path / 'folder'
    save_pretrained(model, folder)
    (folder / 'model.safetensors').unlink()
    torch.save(Hostile(trap), folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='cannot be made'):
        create_model(f'local-dir:{folder}', pretrained=True)

    server, environment = hub
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    server.repos['me/hostile'] = dict(files=files, private=False)
    code = "import timm, timm_mlcsd; timm.create_model('hf-hub:me/hostile', pretrained=True)"
    run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode != 0 and 'eights' in run.stderr
    assert not trap.exists()
    # the trap works where the file is unpickled
    torch.load(path, weights_only=False)
    assert trap.exists()

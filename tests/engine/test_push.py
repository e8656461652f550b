"""mlcsd-push: what it writes, where, and what it says when it cannot."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import hub_server

from timm_mlcsd import from_pretrained
from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.cli import push
from timm_mlcsd.errors import UserError
from timm_mlcsd.hub import label_names

ARGS = dict(num_classes=3, exits=2, channels=(8, 8, 8, 8), small_input=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint as train.py writes it, with a policy beside it."""
    folder = tmp_path_factory.mktemp('run')
    model = timm.create_model('mlcsd_resnet18', **ARGS).eval()
    config = dict(input_size=(3, 32, 32), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), crop_pct=1.0)
    state = dict(
        arch='mlcsd_resnet18',
        model_args=ARGS,
        state_dict=model.state_dict(),
        data_config=dict(config, interpolation='bilinear', crop_mode='center'),
        args=dict(lr=0.1),
        epoch=0,
        class_names=['ant', 'bee', 'cow'],
        results=[dict(top1=50.0), dict(top1=75.0)],
        measured_on='four images',
    )
    torch.save(state, folder / 'model_best.pth.tar')
    ExitPolicy([0.5], exit_names=model.exit_names).for_weights(model).save(folder)
    return folder / 'model_best.pth.tar'


def failure(argv, capsys):
    with pytest.raises(SystemExit) as error:
        push.main([str(a) for a in argv])
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.count('\n') == 1, text
    return text


def test_a_folder_gets_all_that_is_known(trained, tmp_path, capsys):
    push.main([str(trained), str(tmp_path / 'new' / 'net'), '--license', 'mit'])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(tmp_path / 'new' / 'net') and f'from_pretrained({out[0]!r})' in out[1]
    files = {'config.json', 'model.safetensors', 'README.md', 'exit_policy.json'}
    assert {p.name for p in (tmp_path / 'new' / 'net').iterdir()} == files
    model = from_pretrained(out[0])
    assert label_names(model) == ['ant', 'bee', 'cow']
    config = timm.data.resolve_data_config(model=model)
    assert tuple(config['mean']) == (0.4, 0.4, 0.4) and config['interpolation'] == 'bilinear'
    ExitPolicy.load(out[0]).check_weights(model)
    card = (tmp_path / 'new' / 'net' / 'README.md').read_text()
    assert 'license: mit' in card and '| 75.00 |' in card and 'Top-1 on four images.' in card and '`lr`' in card


def test_which_targets_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'file').write_text('')
    for folder in ('/x', './x', '../x', '~/x', 'x/', 'a/b/', 'here', 'local-dir:x', '.', str(tmp_path)):
        assert push.folder_of(folder) is not None, folder
    for repo in ('hf-hub:here', 'hf-hub:here/x', 'hf_hub:a/b', 'a/b', 'name'):
        assert push.folder_of(repo) is None, repo
    for unclear in ('here/x', 'file'):
        with pytest.raises(UserError, match=rf'write \./{unclear} for the folder, hf-hub:{unclear} for the Hub'):
            push.folder_of(unclear)
    with pytest.raises(UserError, match=r'write \./a/b/c for a folder'):
        push.folder_of('a/b/c')


def test_mistakes(trained, tmp_path, capsys):
    target = tmp_path / 'net'
    assert '--private is for the Hub' in failure([trained, target, '--private'], capsys)
    assert '--revision is for the Hub' in failure([trained, target, '--revision', 'x'], capsys)
    assert 'expected an identifier' in failure([trained, target, '--license', 'mit\ntags: [x]'], capsys)
    assert 'holds checkpoints' in failure([trained, trained.parent], capsys)
    assert not target.exists()
    push.main([str(trained), str(target)])
    capsys.readouterr()
    assert 'is what is to be saved' in failure([target, target], capsys)
    content = json.loads((target / 'exit_policy.json').read_text())
    (target / 'exit_policy.json').write_text(json.dumps(dict(content, weights_digest='sha256:' + '0' * 64)))
    assert 'other weights' in failure([target, tmp_path / 'other'], capsys)
    assert not (tmp_path / 'other').exists()


TOKEN = 'hf_' + 'x' * 34
# one process, because importing takes longer than all the cases
CASES = """
import sys, time, timm, timm_mlcsd, huggingface_hub.file_download
from timm_mlcsd import from_pretrained, push_to_hub
from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.hub import find_policy

# the Hub's client tries again several times, for minutes
time.sleep = lambda seconds: None
huggingface_hub.file_download._ETAG_RETRY_TIMEOUT = 1
model = timm.create_model('mlcsd_resnet18', num_classes=3, exits=2, channels=(8, 8, 8, 8), small_input=True)
other = ExitPolicy([0.5]).for_weights(timm.create_model('mlcsd_resnet18', exits=2, num_classes=3))
CALLS = {
    'load': lambda repo: from_pretrained('hf-hub:' + repo),
    'policy': lambda repo: find_policy('hf-hub:' + repo),
    'push': lambda repo: push_to_hub(model, repo, token='TOKEN'),
    'names': lambda repo: push_to_hub(model, repo, class_names=['a'] * 10, token='TOKEN'),
    'twice': lambda repo: push_to_hub(model, repo, class_names=['a', 'b', 'a'], token='TOKEN'),
    'results': lambda repo: push_to_hub(model, repo, results=[dict(top1='x')] * 2, token='TOKEN'),
    'license': lambda repo: push_to_hub(model, repo, license='a: b', token='TOKEN'),
    'other': lambda repo: push_to_hub(model, repo, policy=other, token='TOKEN'),
    'exits': lambda repo: push_to_hub(model, repo, policy=ExitPolicy([0.5, 0.5]), token='TOKEN'),
    'private': lambda repo: push_to_hub(model, repo, private=True, token='TOKEN'),
}
for case in sys.argv[1:]:
    call, repo = case.split('=')
    try:
        print(case, '->', CALLS[call](repo))
    except ValueError as e:
        print(case, '->', ' '.join(str(e).split()))
""".replace('TOKEN', TOKEN)


def results(server_address, tmp_path, cases, **environment):
    places = dict(HF_ENDPOINT=server_address, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0')
    environment = {**os.environ, **places, **environment}
    environment.update(HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
    environment.update(HF_HUB_ETAG_TIMEOUT='1', HF_HUB_DOWNLOAD_TIMEOUT='1')
    command = [sys.executable, '-c', CASES, *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = dict(line.split(' -> ', 1) for line in run.stdout.splitlines())
    assert list(lines) == cases, run.stderr
    return lines, run.stderr


ANSWERS = {
    401: 'does not accept the token',
    403: '403, access is forbidden',
    404: '404, ',
    429: '429, too many requests',
    500: '500, the Hub has an internal error',
    'slow': 'did not answer in time',
}


def test_errors_of_the_hub_say_what_happened(tmp_path):
    with hub_server() as server:
        for status in ANSWERS:
            server.statuses[f's{status}'] = status
        server.repos['me/empty'] = dict(files={}, private=False)
        calls = [c for c in ('load', 'policy') for _ in ANSWERS]
        cases = [f'{call}=me/s{status}' for call, status in zip(calls, [*ANSWERS, *ANSWERS])]
        cases += ['load=me/none', 'load=me/empty', 'policy=me/empty', 'push=me/s403']
        lines, _ = results(server.address, tmp_path, cases)
    for case in cases[:-4]:
        status = case.partition('/s')[2]
        expected = ANSWERS[int(status) if status.isdigit() else status]
        assert expected in lines[case] and 'onnection' not in lines[case], (case, lines[case])
    assert 'there is no such repository, or it is private' in lines['load=me/none']
    assert 'the repository has no such file' in lines['load=me/empty']
    assert lines['policy=me/empty'] == 'None'


def test_nothing_is_made_on_the_hub_before_all_is_checked(tmp_path):
    expected = {
        'names=me/net': 'class_names has 10 names for 3 classes',
        'twice=me/net': 'classes 0 and 2 are both named',
        'results=me/net': 'a number top1',
        'license=me/net': 'expected an identifier',
        'other=me/net': 'other weights',
        'exits=me/net': 'for 3 exits; the network has 2',
        'push=a/b/c': 'expected the name of a repository',
    }
    with hub_server() as server:
        lines, _ = results(server.address, tmp_path, list(expected))
        assert not server.repos and not server.log
        server.repos['me/public'] = dict(files={}, private=False)
        more, _ = results(server.address, tmp_path, ['push=net', 'private=me/public'])
        assert set(server.repos) == {'me/net', 'me/public'} and not server.repos['me/public']['files']
    for case, message in expected.items():
        assert message in lines[case]
    assert '/me/net/commit/' in more['push=net'] and 'got an existing public one' in more['private=me/public']


def test_without_a_connection(tmp_path):
    lines, log = results('http://127.0.0.1:9', tmp_path, ['load=me/net', 'policy=me/net'])
    assert 'there is no connection to the Hub' in lines['load=me/net']
    assert lines['policy=me/net'] == 'None' and 'cannot be loaded; none is used: there is no connection' in log
    cases = ['load=me/net', 'policy=me/net', 'push=me/net']
    lines, log = results('http://127.0.0.1:9', tmp_path, cases, HF_HUB_OFFLINE='1')
    assert all('HF_HUB_OFFLINE is set' in lines[case] for case in ('load=me/net', 'push=me/net'))
    assert lines['policy=me/net'] == 'None' and 'none is used: HF_HUB_OFFLINE is set' in log

"""validate.py --adaptive: a policy from the images that training held out, and what it does to others."""

import json
import math
import re
import shutil
import subprocess

import pytest
import timm
from PIL import Image
from scripts import assert_same, run

from timm_mlcsd import save_pretrained
from timm_mlcsd.adaptive import THRESHOLD_METHODS, AdaptiveModel, ExitPolicy
from timm_mlcsd.cli import predict, push, train, validate
from timm_mlcsd.engine import validation
from timm_mlcsd.network import load_checkpoint

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@pytest.fixture
def mine(trained, tmp_path):
    """A run folder of this test's own."""
    shutil.copytree(trained, tmp_path / 'run')
    return tmp_path / 'run'


@pytest.fixture
def flags(mine):
    """Adaptive validation of the small run."""
    return ['--checkpoint', mine, '--split', 'test', '--workers', 0, '--device', 'cpu', '--adaptive']


def failure(argv, capsys, main=validate.main):
    assert run(main, argv) == 2
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    return error


@pytest.mark.parametrize(
    'goal',
    [('--budget', '97%'), ('--budget', '2.35'), ('--max-drop', 0, '--confidence', 'none'), ('--latency-budget', 50)],
)
def test_a_policy_for_every_goal(goal, flags, mine, tmp_path, capsys):
    out = tmp_path / 'results.json'
    assert run(validate.main, [*flags, *goal, '--save-policy', '--results-file', out]) == 0
    printed = capsys.readouterr().out
    assert 'Adaptive, fitted to 5 images of the held-out part of train' in printed
    record = json.loads(out.read_text())['adaptive']
    assert sum(row['share'] for row in record['exits']) == pytest.approx(100)
    assert record['adaptive']['MMACs'] <= record['backbone']['MMACs'] or goal[0] == '--latency-budget'
    policy = ExitPolicy.load(mine)
    assert ExitPolicy.from_dict(record['policy']) == policy and len(policy.exit_names) == 4
    assert AdaptiveModel.from_pretrained(mine).policy == policy


@pytest.mark.parametrize(
    'extra',
    [
        ('--score', 'patience'),
        ('--aggregate', 'mean'),
        ('--aggregate', 'fitted'),
        ('--aggregate', 'mean', '--budget', '100%'),
        ('--score', 'margin', '--method', 'exit_rates'),
        ('--amp', '--amp-dtype', 'bfloat16'),
    ],
)
def test_scores_and_answers(extra, flags, tmp_path):
    out = tmp_path / 'results.csv'
    assert run(validate.main, [*flags, '--budget', '97%', *extra, '--results-file', out]) == 0
    header, *rows = out.read_text().splitlines()
    assert 'threshold' in header.split(',') and len(rows) == 4


def test_the_policy_beside_the_weights(flags, mine, folder, tmp_path, capsys):
    assert 'there is no policy beside the weights; give --budget' in failure(flags, capsys)
    ExitPolicy([0.0, math.inf, math.inf]).save(mine)
    assert run(validate.main, flags) == 0
    assert re.search(r'Ex1 +0\.0000 +100\.00', capsys.readouterr().out)
    photo = folder / 'test' / 'red' / '0.png'
    for argv, exit_ in (([], 'Ex1'), (['--no-policy'], 'Ex4'), (['--threshold', 1], 'Ex4')):
        assert run(predict.main, [mine, photo, *argv]) == 0
        assert exit_ in capsys.readouterr().out
    ExitPolicy([math.inf] * 3).save(tmp_path / 'other.json')
    assert run(validate.main, [*flags, '--policy', tmp_path / 'other.json']) == 0
    assert re.search(r'Ex1 +off +0\.00', capsys.readouterr().out)
    ExitPolicy([0.5]).save(mine)
    assert 'the policy has 1 thresholds, for 2 exits; the network has 4' in failure(flags, capsys)
    assert 'the network has 4' in failure([mine, photo], capsys, predict.main)


def test_it_never_calibrates_on_images_that_were_trained_on(flags, capsys, folder, small_flags, tmp_path):
    flags = [*flags, '--budget', '97%']
    error = failure([*flags, '--calibration-split', 'train'], capsys)
    assert "the checkpoint was trained on split 'train'" in error and 'leave --calibration-split out' in error
    # another word for the same folder, and a path of another spelling
    assert 'was trained on' in failure([*flags, '--calibration-split', 'training'], capsys)
    again = str(folder / '..' / folder.name)
    assert 'was trained on' in failure([*flags, '--data-dir', again, '--calibration-split', 'train'], capsys)
    assert 'fitted to these images' in failure([*flags, '--held-out'], capsys)
    assert 'fitted to split' in failure([*flags, '--calibration-split', 'test'], capsys)


def test_it_never_reports_on_images_that_it_calibrates_on(folder, small_flags, tmp_path, capsys):
    for split in ('train', 'val'):
        shutil.copytree(folder / 'test', tmp_path / 'data' / split)
    argv = [tmp_path / 'data', *small_flags, '--epochs', 1, '--val-split', 'val', '--output', tmp_path]
    assert run(train.main, [*argv, '--experiment', 'run']) == 0
    flags = ['--checkpoint', tmp_path / 'run', '--workers', 0, '--adaptive', '--budget', '97%']
    # another name for the folder val
    assert 'fitted to split' in failure([*flags, '--split', 'validation'], capsys)


def test_the_held_out_part_is_not_reported_on_with_the_rest(flags, capsys):
    flags[flags.index('test')] = 'train'
    assert '--split train: the policy is fitted to these images' in failure([*flags, '--budget', '97%'], capsys)


def test_timing_leaves_the_network_as_it_is(trained, flags, monkeypatch):
    seen = []
    inner = validation.benchmark_policy
    monkeypatch.setattr(
        validation,
        'benchmark_policy',
        lambda evaluator, *rest: seen.append(evaluator.model) or inner(evaluator, *rest),
    )
    assert run(validate.main, [*flags, '--latency-budget', 50]) == 0
    assert_same(seen[0].state_dict(), load_checkpoint(trained / 'model_best.pth.tar')['state_dict'])


def test_a_folder_that_knows_its_channels_and_classes(tmp_path, capsys):
    model = timm.create_model(
        'mlcsd_resnet18', in_chans=1, num_classes=10, exits=2, small_input=True, channels=(8,) * 4
    )
    names = [str(n) for n in range(10)]
    grey = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    save_pretrained(model, tmp_path / 'net', data_config=grey, class_names=names, policy=ExitPolicy([0.5]))
    flags = ['--model', f'local-dir:{tmp_path / "net"}', '--dataset', 'digits', '--split', 'test', '--workers', 0]
    assert run(validate.main, [*flags, '--adaptive']) == 0
    assert 'Adaptive, policy ' in capsys.readouterr().out
    assert 'name a --calibration-split' in failure([*flags, '--adaptive', '--max-drop', 0], capsys)
    save_pretrained(model, tmp_path / 'net', data_config=grey, class_names=names[::-1], policy=ExitPolicy([0.5]))
    assert 'the classes of test (0, 1, 2, 3, 4, ...) are not those' in failure([*flags, '--adaptive'], capsys)


def test_broken_policy_files_are_one_line(mine, folder, capsys):
    photo = folder / 'test' / 'red' / '0.png'
    for text in ('{"version": 2, "thresholds": []}', '{', '[]'):
        (mine / 'exit_policy.json').write_text(text)
        assert 'the exit policy cannot be used' in failure([mine, photo], capsys, predict.main)
        assert 'the exit policy cannot be used' in failure([mine, 'me/net'], capsys, push.main)


def test_a_split_of_its_own_calibrates(flags, folder, tmp_path, capsys):
    for split in ('val', 'test'):
        shutil.copytree(folder / 'test', tmp_path / 'other' / split)
    for path in (tmp_path / 'other' / 'val').glob('*/*.png'):
        Image.open(path).rotate(90).save(path)
    argv = [*flags, '--data-dir', tmp_path / 'other', '--calibration-split', 'val', '--max-drop', 50]
    assert run(validate.main, argv) == 0
    assert 'fitted to 12 images of val' in capsys.readouterr().out


def test_a_certified_policy_says_so(flags, mine, tmp_path, capsys):
    out = tmp_path / 'results.json'
    assert (
        run(validate.main, [*flags, '--max-drop', 80, '--confidence', 0.9, '--save-policy', '--results-file', out]) == 0
    )
    printed = capsys.readouterr().out
    assert 'certified: drop on new images of at most 80 points, with confidence 0.9, from 3 images' in printed
    policy = ExitPolicy.load(mine)
    expected = dict(risk='drop', limit=80, confidence=0.9, images=3, bound='binomial')
    assert {name: policy.certificate[name] for name in expected} == expected
    record = json.loads(out.read_text())['adaptive']
    assert record['policy']['certificate'] == policy.certificate
    assert record['calibration']['method'] == 'exit_rates' and record['calibration']['cross_validated'] is None
    # a policy from a file says what was certified about it, and so does its page
    page = tmp_path / 'page.html'
    assert run(validate.main, [*flags, '--report', page]) == 0
    assert 'certified: drop on new images of at most 80 points' in capsys.readouterr().out
    assert 'certified: drop on new images of at most 80 points' in page.read_text()


def test_a_budget_is_cross_validated(flags, tmp_path, capsys):
    out = tmp_path / 'results.json'
    assert run(validate.main, [*flags, '--budget', '97%', '--results-file', out]) == 0
    calibration = json.loads(out.read_text())['adaptive']['calibration']
    assert calibration['method'] in THRESHOLD_METHODS and len(calibration['cross_validated']) == 2
    assert f'method {calibration["method"]}: top-1 ' in capsys.readouterr().out


def test_what_cannot_be_certified(flags, capsys):
    error = failure([*flags, '--max-drop', 5], capsys)
    assert '--max-drop: max_drop=5: 5 images (2 to fit, 3 to certify) can certify a drop of 63.16 points' in error
    assert 'give 79 images' in error and 'confidence none' in error
    assert '--risk selective: expected --max-drop P' in failure([*flags, '--risk', 'selective'], capsys)
    assert "risk='selective': expected a confidence" in failure(
        [*flags, '--max-drop', 50, '--risk', 'selective', '--confidence', 'none'], capsys
    )
    assert 'argument --confidence: expected a number at least 0.5' in failure([*flags, '--confidence', 1], capsys)


def test_mistakes(flags, mine, tmp_path, capsys):
    plain = [flag for flag in flags if flag != '--adaptive']
    goal = ['--budget', '97%', '--confidence', 0.9]
    assert '--confidence: expected --max-drop P' in failure([*flags, *goal], capsys)
    assert '--calibration-split: no policy is fitted to it' in failure([*flags, '--calibration-split', 'train'], capsys)
    assert '--budget: only with --adaptive' in failure([*plain, '--budget', '97%'], capsys)
    assert '--budget, --max-drop: give one' in failure([*flags, '--budget', '97%', '--max-drop', 0], capsys)
    assert 'argument --budget: expected a positive number of MMACs' in failure([*flags, '--budget', 'half'], capsys)
    assert re.search('budget=.* is out of reach: expected a mean', failure([*flags, '--budget', '0.1%'], capsys))
    assert 'max_drop=-90.0 is out of reach' in failure([*flags, '--max-drop', -90, '--confidence', 'none'], capsys)
    assert '--score, --aggregate and --method are of a policy to fit' in failure([*flags, '--score', 'margin'], capsys)
    assert '--save-policy: no policy is fitted' in failure([*flags, '--save-policy'], capsys)
    assert 'must end in .html' in failure([*flags, '--max-drop', 0, '--report', tmp_path / 'page.pdf'], capsys)
    (tmp_path / 'bad.json').write_text('{}')
    assert "expected 'timm_mlcsd exit policy'" in failure([*flags, '--policy', tmp_path / 'bad.json'], capsys)
    assert not (mine / 'exit_policy.json').exists()


@pytest.fixture
def page(flags, tmp_path):
    path = tmp_path / 'page.html'
    assert run(validate.main, [*flags, '--budget', '97%', '--report', path]) == 0
    return path


def test_page_needs_nothing_else(page, trained):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and 'http' not in text.replace(
        'http://www.w3.org/2000/svg', ''
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert len(data['exits']) == len(data['reliability']) == 4 and len(data['pictures']) >= 1
    assert all(p['src'].startswith('data:image/png;base64,') for p in data['pictures'])
    costs = [policy['cost'] for policy in data['policies']]
    assert costs == sorted(costs) and 0 <= data['chosen'] < len(costs)
    names = load_checkpoint(trained)['class_names']
    assert all(p['truth'] in names and len(p['says']) == 4 for p in data['pictures'])


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
def test_page_in_a_browser(page):
    text = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    last = len(data['policies']) - 1
    for where, policy in (('', data['policies'][data['chosen']]), (f'#{last}', data['policies'][last])):
        command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', f'file://{page}{where}']
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        assert f'{policy["cost"]:.1f} MMACs per image' in dom
        assert dom.count('<img') == len(data['pictures']) == dom.count('class="answer"')
        assert dom.count('<svg') == 2 + 4  # curve, exits, and a reliability diagram per exit


def test_names_of_classes_cannot_break_out_of_the_page(tmp_path):
    from timm_mlcsd.report import write_page

    write_page(tmp_path / 'page.html', dict(title='</script><script>alert(1)</script>'))
    assert 'alert(1)</script>' not in (tmp_path / 'page.html').read_text()


def test_torch_and_logits_agree(flags, capsys):
    assert run(validate.main, [*flags, '--budget', '97%']) == 0
    assert 'on all but 0 of 12 images' in capsys.readouterr().out


def test_own_images_in_one_folder_get_a_policy(folder, small_flags, tmp_path, capsys):
    """Nothing but the held-out images can be fitted to and reported on: a half for each."""
    argv = [folder / 'train', *small_flags, '--val-fraction', 0.5, '--epochs', 2, '--output', tmp_path]
    assert run(train.main, [*argv, '--experiment', 'run']) == 0
    flags = ['--checkpoint', tmp_path / 'run', '--workers', 0, '--adaptive', '--max-drop', 50]
    assert '--held-out evaluates those, with --adaptive too' in failure(flags, capsys)
    assert run(validate.main, [*flags, '--held-out', '--save-policy']) == 0
    out = capsys.readouterr().out
    assert '12 images of the other half of the held-out part of train' in out
    assert 'fitted to 12 images of one half of the held-out part of train' in out
    policy = ExitPolicy.load(tmp_path / 'run')
    assert policy.calibration_images == 12 and policy.weights_digest.startswith('sha256:')
    # the policy knows what it was fitted to
    fitted = ['--checkpoint', tmp_path / 'run', '--workers', 0, '--adaptive', '--held-out']
    assert 'was fitted to one half of the held-out part of train' in failure(fitted, capsys)


def test_a_policy_of_other_weights_is_refused(mine, flags, folder, capsys):
    photo = folder / 'test' / 'red' / '0.png'
    assert run(validate.main, [*flags, '--max-drop', 80, '--save-policy']) == 0
    assert run(predict.main, [mine, photo]) == 0 and run(validate.main, flags) == 0
    capsys.readouterr()
    last = mine / 'last.pth.tar'
    for argv, main in (
        ([last, photo], predict.main),
        (['--checkpoint', last, *flags[2:]], validate.main),
        ([mine, photo, '--use-ema'], predict.main),
    ):
        assert 'weights' in failure(argv, capsys, main)
    assert run(predict.main, [last, photo, '--no-policy']) == 0

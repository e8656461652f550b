"""The scripts in examples/ run, and what they print is consistent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_mlcsd import from_pretrained
from timm_mlcsd.adaptive import SCORES, THRESHOLD_METHODS

pytest.importorskip('sklearn')

ROOT = Path(__file__).parents[1]
NUMBER = r'(\d+\.\d+)'


def printed(script, output):
    """Run an example for one epoch; what it printed."""
    # the package of this checkout, not one that is installed
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    command = [sys.executable, ROOT / 'examples' / f'{script}.py', '--epochs', '1', '--output', output]
    done = subprocess.run(
        command, cwd=output.parent, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of all matches of a pattern at the start of a line, as numbers."""
    return [tuple(map(float, match)) for match in re.findall(f'^{pattern}', text, re.M)]


def test_own_loop(tmp_path):
    text = printed('own_loop', tmp_path / 'own')
    ((loss, *validation),) = numbers(rf'epoch 0: loss {NUMBER}, .* exits' + rf' {NUMBER}' * 4 + '$', text)
    assert loss > 0 and all(0 <= top1 <= 100 for top1 in validation)
    exits = numbers(r'layer\d\.\d' + rf' +{NUMBER}' * 3 + '$', text)
    assert len(exits) == 4 and 'best epoch on 360 test images' in text
    top1, loss, macs = zip(*exits)
    assert max(top1) > 20  # chance is 10
    assert min(loss) > 0 and list(macs) == sorted(set(macs))
    assert from_pretrained(tmp_path / 'own').num_exits == 4


def test_deploy(tmp_path, onnx_needs):
    pytest.importorskip('onnxscript')
    if onnx_needs:
        pytest.skip(onnx_needs)
    text = printed('deploy', tmp_path / 'deploy')
    assert 'backbone unchanged: yes\n' in text
    ((plain, plain_macs),) = numbers(rf'plain network +{NUMBER} +{NUMBER}$', text)
    ((ours, macs),) = numbers(rf'PyTorch +{NUMBER} +{NUMBER}$', text)
    ((theirs, their_macs),) = numbers(rf'runner\.py +{NUMBER} +{NUMBER}$', text)
    assert plain > 20 and ours > 20  # chance is 10
    # the graphs round differently, so an image or two may be on the other side of a threshold
    assert abs(ours - theirs) < 1 and abs(macs - their_macs) < 0.02 * macs
    assert 0 < macs < 1.1 * plain_macs  # all images at the last exit, with all heads
    (counts,) = re.findall(r'^images that stop at each exit: \[(.*)\]$', text, re.M)
    assert sum(map(int, counts.split(', '))) == 360 and len(counts.split(', ')) == 4
    ((same, total),) = numbers(r'runner\.py and PyTorch agree on class and exit of (\d+) of (\d+) images$', text)
    assert same >= 356 and total == 360
    assert (tmp_path / 'deploy' / 'exported' / 'runner.py').is_file()


def test_compare_policies(tmp_path):
    text = printed('compare_policies', tmp_path / 'policies')
    first, *rest = re.split(r'\nbudget ', text)
    exits = numbers(r'layer\d\.\d' + rf' +{NUMBER}' * 3 + '$', first)
    assert len(exits) == 4 and max(validation for validation, _, _ in exits) > 20  # chance is 10
    assert len(rest) == 3
    for part in rest:
        budget = float(part.split()[0])
        rows = re.findall(r'^(\w+) +(\w+)' + rf' +{NUMBER}' * 4 + '$', part, re.M)
        results = {(score, method): tuple(map(float, row)) for score, method, *row in rows}
        assert list(results) == [(score, method) for score in SCORES for method in THRESHOLD_METHODS]
        assert all(macs <= budget + 0.011 for _, _, macs, _ in results.values())  # both are rounded
        # on the images that it is fitted to, the search is at least as good as the sweep that it starts from
        for score in SCORES:
            assert results[score, 'optimal'][0] >= results[score, 'exit_rates'][0]
        ((score, method, test, macs),) = re.findall(
            rf'^best on the validation images: (\w+), (\w+); test {NUMBER}% at {NUMBER} MMACs$', part, re.M
        )
        best = results[score, method]
        assert best[0] == max(validation for validation, *_ in results.values())
        assert (best[1], best[3]) == (float(test), float(macs))

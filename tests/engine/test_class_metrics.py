"""Metrics per class against scikit-learn's."""

import json

import pytest
import torch
from scripts import run
from sklearn.metrics import precision_recall_fscore_support

from timm_mlcsd.cli import validate
from timm_mlcsd.engine.class_metrics import ClassCounts


def test_metrics_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (200,), generator=generator)
    logits = torch.randn(2, 200, 7, generator=generator)
    logits[:, :, 6] = -9  # neither a label nor an answer
    counts = ClassCounts(['Ex1', 'Ex2'], 7)
    batches = list(zip(logits.split(64, dim=1), targets.split(64)))
    passed = list(counts.counted(batches))
    assert all(a is c and b is d for (a, b), (c, d) in zip(passed, batches))
    rows = counts.rows(['a', None, 'c'])
    assert [row['index'] for row in rows] == [0, 1, 2, 3, 4, 5] and [row['name'] for row in rows[:3]] == ['a', '1', 'c']
    assert [row['images'] for row in rows] == torch.bincount(targets, minlength=6).tolist()
    for k, name in enumerate(['Ex1', 'Ex2']):
        expected = precision_recall_fscore_support(targets, logits[k].argmax(-1), labels=range(5))
        for i, row in enumerate(rows[:5]):
            found = [row[name][key] for key in ('precision', 'recall', 'f1')]
            assert found == pytest.approx([100 * values[i] for values in expected[:3]])
        # class 5 has no image
        assert rows[5][name] == dict(recall=None, precision=0.0, f1=0.0)


def test_results_file_has_the_classes_of_exits_and_policy(adaptive_run, folder, tmp_path):
    flags = [folder, '--checkpoint', adaptive_run, '--split', 'test', '-j', 0, '--device', 'cpu']
    for more, answers in (([], 4), (['--adaptive'], 5)):
        assert run(validate.main, [*flags, *more, '--results-file', tmp_path / 'a.json']) == 0
        results = json.loads((tmp_path / 'a.json').read_text())
        assert [row['name'] for row in results['classes']] == ['blue', 'green', 'red']
        assert all(row['images'] == 4 and len(row) == 3 + answers for row in results['classes'])
        # classes of one size: the mean of their recalls is the accuracy
        for exit in results['exits']:
            mean = sum(row[exit['exit']]['recall'] for row in results['classes']) / 3
            assert mean == pytest.approx(exit['top1'])

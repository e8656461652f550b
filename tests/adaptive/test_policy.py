import json
import math

import numpy as np
import pytest
import timm
import torch

import timm_mlcsd  # noqa: F401
from timm_mlcsd.adaptive import SCORES, ExitPolicy, evaluate_policy, fit_weights
from timm_mlcsd.adaptive.policy import score_of
from timm_mlcsd.models import weights_digest

INF = math.inf


def run(policy, logits):
    """Answers and scores of all exits, for logits [K, N, C]."""
    history, answers, scores = None, [], []
    for k in range(policy.num_exits):
        if policy.is_on(k):
            answer, score, history = policy.step(k, logits[k], history)
            answers.append(answer)
            scores.append(score)
    return torch.stack(answers), torch.stack(scores)


@pytest.mark.parametrize('score', SCORES)
def test_scores_are_higher_for_the_surer(score):
    logits = torch.tensor([[0.0, 0, 0], [2, 1, 0], [5, 0, 0], [INF, 0, 0]]).nan_to_num(posinf=200.0)
    scores = run(ExitPolicy([0.5, 0.5], score=score), torch.stack([logits] * 3))[1]
    if score == 'patience':
        assert scores.tolist() == [[1] * 4, [2] * 4, [3] * 4]
    else:
        assert (scores[0].diff() > 0).all()
        # of three classes: nothing known, everything known
        limits = {'confidence': (1 / 3, 1.0), 'entropy': (0.0, 1.0), 'margin': (0.0, 1.0), 'logit_margin': (0.0, 200.0)}
        torch.testing.assert_close(scores[0, [0, -1]], torch.tensor(limits[score]))


@pytest.mark.parametrize('score', ['luck', 'patience'])
def test_what_is_no_score_of_logits_is_refused(score):
    with pytest.raises(ValueError, match=f'got {score!r}'):
        score_of(torch.zeros(2, 3), score)
    runner = pytest.importorskip('timm_mlcsd.adaptive.export.onnx_runner')
    with pytest.raises(ValueError, match=f'got {score!r}'):
        runner._score(np.zeros((2, 3), np.float32), score)


def test_the_logit_margin_is_a_ratio_of_probabilities_and_bounded():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for aggregate in ('last', 'mean'):
        policy = ExitPolicy([0.5], 'logit_margin', [2.0, 0.5], aggregate)
        answers, scores = run(policy, logits)
        best = answers.softmax(-1).topk(2, dim=-1).values
        torch.testing.assert_close(scores, (best[..., 0] / best[..., 1]).log())
    # impossible classes, and a single class
    assert run(policy, torch.tensor([3.0, -INF, -INF]).expand(2, 1, 3))[1].tolist() == [[1e6], [1e6]]
    assert run(policy, torch.zeros(2, 1, 1))[1].tolist() == [[1e6], [1e6]]


def test_patience_counts_exits_that_agree_in_a_row():
    predictions = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 0], [0, 1, 1]])
    logits = torch.nn.functional.one_hot(predictions, 2).float()
    scores = run(ExitPolicy([9, 9, 9], score='patience'), logits)[1]
    assert scores.T.tolist() == [[1, 2, 3, 4], [1, 1, 2, 3], [1, 2, 1, 1]]
    # an exit that is off is not asked
    scores = run(ExitPolicy([9, 9, INF], score='patience'), logits)[1]
    assert scores.T.tolist() == [[1, 2, 3], [1, 1, 2], [1, 2, 3]]


def test_mean_is_the_geometric_mean_of_the_exits_that_are_on():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5)
    probs = logits.double().softmax(-1)
    answers = run(ExitPolicy([0.5, 0.5], aggregate='mean', temperatures=[1, 1, 1]), logits)[0]
    for k in range(3):
        expected = probs[: k + 1].prod(0) ** (1 / (k + 1))
        torch.testing.assert_close(answers[k].softmax(-1).double(), expected / expected.sum(-1, keepdim=True))
    answers = run(ExitPolicy([0.5, INF], aggregate='mean'), logits)[0]
    expected = (probs[0] * probs[2]).sqrt()
    torch.testing.assert_close(answers[-1].softmax(-1).double(), expected / expected.sum(-1, keepdim=True))


def test_temperatures_and_weights_are_applied():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    policy = ExitPolicy([0.5], aggregate='fitted', weights=[[2.0], [0.5, 3.0]], temperatures=[1.5, 0.5])
    log_probs = (logits / torch.tensor([1.5, 0.5])[:, None, None]).log_softmax(-1)
    answers = run(policy, logits)[0]
    torch.testing.assert_close(answers[1], (0.5 * log_probs[0] + 3 * log_probs[1]).log_softmax(-1))
    # the weight of an exit that is off goes to the others
    answers = run(ExitPolicy([INF], aggregate='fitted', weights=[[2.0], [0.5, 3.0]]), logits)[0]
    torch.testing.assert_close(answers[0], (3.5 * logits[1].log_softmax(-1)).log_softmax(-1))


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(2, 4, 5).bfloat16()
    answer, score, _ = ExitPolicy([0.5]).step(0, logits[0])
    assert answer.dtype == score.dtype == torch.float32


def test_file_round_trip(tmp_path):
    policy = ExitPolicy([0.1 + 0.2, INF], 'margin', (1, 2, 3), 'fitted', [[1], [1, 2], [1, 2, 3]], ['a', 'b', 'c'])
    policy.save(tmp_path)
    assert ExitPolicy.load(tmp_path) == ExitPolicy.load(tmp_path / 'exit_policy.json') == policy
    content = json.loads((tmp_path / 'exit_policy.json').read_text())
    assert content['version'] == 1 and content['thresholds'][1] == 'off'
    assert [p.name for p in tmp_path.iterdir()] == ['exit_policy.json']


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='there is no such file; calibrate a policy'):
        ExitPolicy.load(tmp_path)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(aggregate='best'), "aggregate: expected one of last, mean, fitted, got 'best'"),
        (dict(temperatures=[1]), 'temperatures: expected a list of 2 positive numbers'),
        (dict(temperatures=[1, 0]), 'temperatures: expected a number from 0.0001 to 10000, got 0'),
        (dict(temperatures=[1, True]), 'temperatures: expected a number .*, got True'),
        (dict(aggregate='fitted'), 'weights: expected the result of fit_weights'),
        (dict(weights=[[1], [1, 1]]), "weights: expected none with aggregate='last'"),
        (dict(aggregate='fitted', weights=[[1], [1]]), r'weights\[1\]: expected a list of 2 positive numbers'),
        (dict(aggregate='fitted', weights=[[1], [1, 1e308]]), r'weights\[1\]: expected a number'),
        (dict(exit_names=['a']), 'exit_names: expected a list of 2 entries'),
        (dict(exit_names='ab'), "exit_names: expected a list of 2 entries, got 'ab'"),
        (dict(thresholds=[-INF]), r"thresholds\[0\]: expected a number from -1e\+09 to 1e\+09, or 'off', got -inf"),
        (dict(thresholds=[math.nan]), 'got nan'),
        (dict(thresholds=['0.5']), "got '0.5'"),
        (dict(thresholds='123'), "thresholds: expected a list of 0 to 999 numbers, got '123'"),
        (dict(thresholds={0.5: 1}), 'thresholds: expected a list'),
        (dict(thresholds=0.5), 'thresholds: expected a list'),
        (dict(thresholds=[10**400]), r'thresholds\[0\]: expected a number'),
        (dict(thresholds=[10**5000]), r'thresholds\[0\]: expected a number.*got a int'),
        (dict(weights_digest='sha256:12'), 'weights_digest: expected sha256: followed by 64 hexadecimal digits'),
        (dict(calibration_images=True), 'calibration_images: expected an integer'),
        (dict(calibration_images=1.5), 'calibration_images: expected an integer'),
        (dict(calibration_data=7), 'calibration_data: expected a text'),
    ],
)
def test_arguments_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**{'thresholds': [0.5], **kwargs})


def test_arrays_and_tensors_are_lists():
    policy = ExitPolicy([0.5, 0.25, INF], temperatures=[1, 2, 3, 4])
    assert ExitPolicy(torch.tensor([0.5, 0.25, INF]), temperatures=np.arange(1, 5)) == policy
    assert ExitPolicy((t for t in (np.float32(0.5), 0.25, INF)), temperatures=range(1, 5)) == policy


def test_policy_of_another_network():
    policy = ExitPolicy([0.5], exit_names=['layer1', 'layer4'])
    with pytest.raises(ValueError, match='1 thresholds, for 2 exits; the network has 3 exits'):
        policy.check(3)
    with pytest.raises(ValueError, match='for exits at layer1, layer4; the network has them at layer2, layer4'):
        policy.check(2, ['layer2', 'layer4'])


def test_fitted_weights_answer_better_than_any_exit():
    torch.manual_seed(0)
    targets = torch.randint(5, (600,))
    logits = torch.randn(3, 600, 5) + 1.5 * torch.nn.functional.one_hot(targets, 5)
    weights = fit_weights(logits, targets)
    policy = ExitPolicy([INF, 5.0], aggregate='fitted', weights=weights)
    mixed = evaluate_policy(logits, targets, [1, 2, 3], ExitPolicy([9.0, 9.0], aggregate='fitted', weights=weights))
    alone = [100 * (z.argmax(-1) == targets).float().mean().item() for z in logits]
    # three equally good exits with independent errors: all count
    assert mixed.accuracy > max(alone) + 5 and min(weights[-1]) > 0.5
    assert policy.num_exits == 3


def small_network():
    torch.manual_seed(0)
    return timm.create_model('mlcsd_test_resnet', exits=2, num_classes=3).eval()


def test_a_policy_belongs_to_the_weights_that_it_was_fitted_to(tmp_path):
    model = small_network()
    policy = ExitPolicy([0.5]).for_weights(model, 'my pictures, val', 36)
    assert policy.weights_digest == weights_digest(model)
    policy.save(tmp_path)
    assert ExitPolicy.load(tmp_path) == policy
    policy.check_weights(small_network())  # the same weights in another object
    policy.check_weights(torch.compile(model))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    message = r'fitted to other weights .*data my pictures, val, images 36.*--save-policy.*policy.without_digest\(\)'
    with pytest.raises(ValueError, match=message):
        policy.check_weights(model)
    policy.without_digest().check_weights(model)
    assert policy.with_thresholds([0.7]).weights_digest == policy.weights_digest


def test_files_without_a_digest_stay_as_they_were(tmp_path):
    ExitPolicy([0.5, INF]).save(tmp_path)
    content = json.loads((tmp_path / 'exit_policy.json').read_text())
    # what every release so far has written
    assert content == {
        'format': 'timm_mlcsd exit policy',
        'version': 1,
        'thresholds': [0.5, 'off'],
        'score': 'confidence',
        'temperatures': None,
        'aggregate': 'last',
        'weights': None,
        'exit_names': None,
    }
    ExitPolicy.load(tmp_path).check_weights(small_network())


def test_the_name_of_the_data_may_hold_anything():
    policy = ExitPolicy([0.5]).for_weights(small_network(), 'a\x1b[31m' + 'b' * 1000, 3)
    assert policy.calibration_data.startswith('a\\x1b[31mb') and len(policy.calibration_data) == 300


@pytest.mark.parametrize('score', SCORES)
def test_no_sample_leaves_with_an_answer_that_is_not_finite(score):
    logits = torch.tensor([[INF, 0, 0], [math.nan, 0, 0], [-INF] * 3, [5, -INF, 0]]).expand(3, 4, 3)
    policy = ExitPolicy([-1e9, -1e9], score=score)
    scores = run(policy, logits)[1]
    assert (scores[:, :3] == -INF).all() and (scores[:, 3] >= 0).all()


def test_patience_begins_again_after_an_answer_that_is_not_finite():
    logits = torch.tensor([[[5.0, 0]], [[INF, 0]], [[5, 0]], [[5, 0]]])
    scores = run(ExitPolicy([9, 9, 9], score='patience'), logits)[1]
    assert scores[:, 0].tolist() == [1, -INF, 1, 2]

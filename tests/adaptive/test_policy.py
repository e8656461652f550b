import json
import math

import pytest
import torch

from timm_mlcsd.adaptive import SCORES, ExitPolicy, evaluate_policy, fit_weights

INF = math.inf


def run(policy, logits):
    """Answers and scores of all exits, for logits [K, N, C]."""
    memory, answers, scores = None, [], []
    for k in range(policy.num_exits):
        if policy.is_on(k):
            answer, score, memory = policy.answer(k, logits[k], memory)
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
        nothing = {'confidence': 1 / 3, 'entropy': 0, 'margin': 0}[score]
        torch.testing.assert_close(scores[0, [0, -1]], torch.tensor([nothing, 1.0]))


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
    answer, score, _ = ExitPolicy([0.5]).answer(0, logits[0])
    assert answer.dtype == score.dtype == torch.float32


def test_file_round_trip(tmp_path):
    policy = ExitPolicy([0.1 + 0.2, INF], 'margin', (1, 2, 3), 'fitted', [[1], [1, 2], [1, 2, 3]], ['a', 'b', 'c'])
    policy.save(tmp_path)
    assert ExitPolicy.load(tmp_path) == ExitPolicy.load(tmp_path / 'exit_policy.json') == policy
    content = json.loads((tmp_path / 'exit_policy.json').read_text())
    assert content['version'] == 1 and content['thresholds'][1] == 'off'
    assert [p.name for p in tmp_path.iterdir()] == ['exit_policy.json']


@pytest.mark.parametrize(
    'content, message',
    [
        ('', 'cannot be read as JSON'),
        ('[1]', 'no exit policy: it has no list of thresholds'),
        ('{"thresholds": [0.5]}', 'version None; this release reads version 1'),
        ('{"version": 2, "thresholds": [0.5]}', 'version 2'),
        ('{"version": 1, "thresholds": [0.5], "treshold": 3}', 'unknown entries: treshold'),
        ('{"version": 1, "thresholds": 7}', 'no list of thresholds'),
        ('{"version": 1, "thresholds": ["x"]}', 'must be a list of numbers'),
        ('{"version": 1, "thresholds": [NaN]}', 'or inf to turn the exit off'),
        ('{"version": 1, "thresholds": [0.5], "score": "luck"}', "score='luck' is unknown; choose one of confidence"),
    ],
)
def test_files_that_are_no_policies(content, message, tmp_path):
    path = tmp_path / 'exit_policy.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ExitPolicy.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='there is no such file; calibrate a policy'):
        ExitPolicy.load(tmp_path)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(aggregate='best'), "aggregate='best' is unknown"),
        (dict(temperatures=[1]), 'must be 2 positive numbers'),
        (dict(temperatures=[1, 0]), 'must be 2 positive numbers'),
        (dict(aggregate='fitted'), 'fit_weights fits them'),
        (dict(weights=[[1], [1, 1]]), "not with 'last'"),
        (dict(aggregate='fitted', weights=[[1], [1]]), '2 rows of 1 to 2 positive numbers'),
        (dict(exit_names=['a']), '1 names for 2 exits'),
        (dict(thresholds=[-INF]), 'must be a number'),
    ],
)
def test_arguments_that_contradict_each_other(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**{'thresholds': [0.5], **kwargs})


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

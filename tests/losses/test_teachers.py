"""The rivals' mixtures against their definitions, one image and exit at a time in float64."""

import math

import pytest
import torch

from timm_mlcsd import MLCSDLoss, MultiExitOutput
from timm_mlcsd.losses import TEACHERS

B, K, C, D = 5, 4, 6, 3


def cross_entropy(logits, target):
    """Of one image at one exit; target is a class or a distribution."""
    log_p = [z - math.log(sum(math.exp(other) for other in logits)) for z in logits]
    if isinstance(target, int):
        return -log_p[target]
    return -sum(t * p for t, p in zip(target, log_p))


def entropy(logits):
    total = sum(math.exp(z) for z in logits)
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits)


def expected_row(name, i, logits, target):
    """W_i of one image."""
    losses = [cross_entropy(z, target) for z in logits]
    if name == 'one-for-all':
        return [0.0] * (K - 1) + [1.0]
    if name == 'minimum':
        return [float(k == losses.index(min(losses))) for k in range(K)]
    if name == 'average':
        return [1 / K] * K
    if name == 'deeper':
        return [1 / (K - 1 - i) if k > i else 0.0 for k in range(K)] if i < K - 1 else [0.0] * (K - 1) + [1.0]
    if name == 'attention':
        scores = [math.exp(-entropy(z)) for z in logits]
        return [s / sum(scores) for s in scores]
    return [(1 - math.exp(loss) / sum(map(math.exp, losses))) / (K - 1) for loss in losses]


RIVALS = [name for name in TEACHERS if name != 'all-for-all']


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('name', RIVALS)
def test_mixtures(name, soft):
    logits = torch.randn(B, K, C, dtype=torch.float64)
    target = torch.rand(B, C, dtype=torch.float64).softmax(-1) if soft else torch.randint(C, (B,))
    weights = TEACHERS[name](K, D)(torch.randn(B, K, D), logits, target)
    expected = [[expected_row(name, i, logits[b].tolist(), target[b].tolist()) for i in range(K)] for b in range(B)]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize('name', RIVALS)
def test_rivals_work_as_teachers(name):
    criterion = MLCSDLoss(K, D, distill=name)
    logits = tuple(torch.randn(B, C, requires_grad=True) for _ in range(K))
    features = tuple(torch.randn(B, D, 2, 2, requires_grad=True) for _ in range(K))
    output = MultiExitOutput(logits, features)
    parts = criterion(output, torch.randint(C, (B,)), return_components=True)
    assert set(parts) == {'loss', 'cls', 'kd', 'ht'} and not list(criterion.parameters())
    learns = [bool(g.any()) for g in torch.autograd.grad(parts['kd'] + parts['ht'], features)]
    assert learns == [True] * (K - 1) + [criterion.mixer.supervises_last_exit]


def test_a_hopeless_exit_gets_no_weight_by_loss():
    # exit 0 is surely wrong: exp(loss) dwarfs the others', so that it weighs nothing and they share the rest
    logits = torch.zeros(B, K, C)
    logits[:, 0, 0] = 50.0
    weights = TEACHERS['confidence'](K, D)(torch.randn(B, K, D), logits, torch.ones(B, dtype=torch.long))
    torch.testing.assert_close(weights[:, :, 0], torch.zeros(B, K))
    torch.testing.assert_close(weights[:, :, 1:], torch.full((B, K, K - 1), 1 / (K - 1)))

"""The running mean of logits that teachers may be mixed from."""

import pytest
import torch

from timm_mlcsd import MLCSDLoss, MultiExitOutput
from timm_mlcsd.losses import LogitMemory

B, K, C, D, M = 4, 3, 5, 6, 10


def output():
    return MultiExitOutput(
        tuple(torch.randn(B, C, requires_grad=True) for _ in range(K)),
        tuple(torch.randn(B, D, 2, 2, requires_grad=True) for _ in range(K)),
    )


def test_means_are_running_and_by_image():
    memory, a, b = LogitMemory(M, K, C, 0.75), torch.randn(B, K, C), torch.randn(B, K, C)
    assert torch.equal(memory(a, torch.tensor([0, 1, 2, 3])), a)
    second = memory(b, torch.tensor([3, 2, 9, 8]))
    torch.testing.assert_close(second[0], 0.75 * a[3] + 0.25 * b[0])
    torch.testing.assert_close(second[1], 0.75 * a[2] + 0.25 * b[1])
    assert torch.equal(second[2:], b[2:])
    third = memory(b, torch.tensor([3, 0, 1, 9]))
    torch.testing.assert_close(third[0], 0.75 * second[0] + 0.25 * b[0])


def test_in_eval_mode_nothing_is_kept():
    memory = LogitMemory(M, K, C, 0.5)
    before = {n: t.clone() for n, t in memory.state_dict().items()}
    memory.eval()(torch.randn(B, K, C), torch.arange(B))
    assert all(torch.equal(t, before[n]) for n, t in memory.state_dict().items())


def test_nan_is_not_remembered():
    memory, a = LogitMemory(M, K, C, 0.5), torch.randn(B, K, C)
    memory(a[:2], torch.tensor([0, 1]))
    bad = a.clone()
    bad[1:3] = float('nan')
    memory(bad, torch.tensor([0, 1, 2, 3]))
    assert memory.mean.isfinite().all() and torch.equal(memory.mean[1], a[1])
    assert memory.seen[:4].tolist() == [True, True, False, True]


@pytest.mark.parametrize('distill', ['one-for-all', 'average', 'all-for-all'])
def test_teachers_are_mixed_from_the_means(distill):
    criterion = MLCSDLoss(K, D, distill=distill, beta=0, pool_momentum=0.5, num_samples=M, num_classes=C)
    plain = MLCSDLoss(K, D, distill=distill, beta=0)
    plain.load_state_dict(criterion.state_dict(), strict=False)
    first, second, target, indices = output(), output(), torch.randint(C, (B,)), torch.tensor([7, 1, 4, 2])
    # the first time there is nothing to remember
    a = criterion(first, target, indices=indices)
    torch.testing.assert_close(a, plain(first, target))
    # then the last exit's students see the mean; check one-for-all in full, the others by their difference
    parts = criterion(second, target, return_components=True, indices=indices)
    if distill == 'one-for-all':
        t = 0.5 * first.logits[-1] + 0.5 * second.logits[-1]
        expected = sum(
            16 * torch.nn.functional.kl_div((z / 4).log_softmax(-1), (t / 4).softmax(-1), reduction='batchmean')
            for z in second.logits
        )
        torch.testing.assert_close(parts['kd'], expected)
    assert not torch.allclose(parts['kd'], plain(second, target, return_components=True)['kd'])


def test_resumes_from_its_state():
    a, b = (MLCSDLoss(K, D, pool_momentum=0.5, num_samples=M, num_classes=C) for _ in range(2))
    target, indices = torch.randint(C, (B,)), torch.arange(B)
    a(output(), target, indices=indices)
    b.load_state_dict(a.state_dict())
    again = output()
    assert torch.equal(a(again, target, indices=indices), b(again, target, indices=indices))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(pool_momentum=1.0, num_samples=M, num_classes=C), 'pool_momentum=1.0 must be at least 0'),
        (dict(pool_momentum=0.5), 'pass num_samples and num_classes'),
        (dict(pool_momentum=0.5, method='cc', num_samples=M, num_classes=C), 'a method that reads logits'),
        (dict(pool_momentum=0.5, alpha=0, num_samples=M, num_classes=C), 'it needs alpha > 0'),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MLCSDLoss(K, D, **kwargs)


def test_asks_for_indices_and_labels():
    criterion = MLCSDLoss(K, D, pool_momentum=0.5, num_samples=M, num_classes=C)
    with pytest.raises(ValueError, match='pool_momentum needs indices'):
        criterion(output(), torch.randint(C, (B,)))
    with pytest.raises(ValueError, match='leave out mixup'):
        criterion(output(), torch.rand(B, C), indices=torch.arange(B))

"""Distillation that waits for what an exit has learned from the labels."""

import pytest
import torch
import torch.nn.functional as F

from timm_mlcsd import MLCSDLoss, MultiExitOutput
from timm_mlcsd.losses import AccuracyRamp

B, K, C, D = 8, 3, 5, 4


def answers(right):
    """Logits [B, K, C] of which exit k has so many right, and the labels."""
    target = torch.arange(B) % C
    wrong = (target + 1) % C
    said = torch.stack([torch.where(torch.arange(B) < count, target, wrong) for count in right], dim=1)
    return 9.0 * F.one_hot(said, C).float(), target


def scales(ramp, logits, target):
    """What it gives after one batch."""
    ramp(logits, target)
    ramp.step()
    return ramp(logits, target).tolist()


def test_scale_goes_from_chance_to_all_right():
    # below chance is nothing; (1/2 - 1/5) / (1 - 1/5)
    logits, target = answers([0, 4, 8])
    assert scales(AccuracyRamp(K, momentum=0.0), logits, target) == pytest.approx([0.0, 0.375, 1.0])
    soft = F.one_hot(target, C).float()
    assert scales(AccuracyRamp(K, momentum=0.0), logits, soft) == pytest.approx([0.0, 0.375, 1.0])


def test_scale_is_a_running_mean_of_the_batches_before():
    ramp = AccuracyRamp(K, momentum=0.9)
    logits, target = answers([8, 8, 8])
    for n in range(4):
        # 8 images are an eighth of 64
        assert ramp(logits, target).tolist() == pytest.approx([1 - 0.9 ** (n / 8)] * K, rel=1e-5)  # float32
    ramp.eval()
    before = ramp(answers([0, 0, 0])[0], target)
    assert torch.equal(ramp(logits, target), before)


def test_an_update_of_several_batches_is_one_of_all_images():
    logits, target = answers([3, 5, 8])
    whole, parts = AccuracyRamp(K), AccuracyRamp(K)
    for ramp, sizes in ((whole, [8]), (parts, [3, 5])):
        ramp.auto = False
        for z, y in zip(logits.split(sizes), target.split(sizes)):
            assert not ramp(z, y).any()  # nothing changes within an update
        ramp.step()
    torch.testing.assert_close(whole.accuracy, parts.accuracy)
    assert whole.accuracy.any() and not whole.seen


@pytest.mark.parametrize('distill', ['one-for-all', 'all-for-all'])
def test_an_exit_that_knows_nothing_learns_from_labels_alone(distill):
    logits, target = answers([0, 8, 8])
    features = torch.rand(K, B, D, 2, 2).unbind(0)
    losses = {}
    for ramp in ('none', 'accuracy'):
        torch.manual_seed(0)
        criterion = MLCSDLoss(K, D, beta=0.1, distill=distill, distill_ramp=ramp)
        if criterion.ramp is not None:
            criterion.ramp.momentum = 0.0
            criterion.ramp(logits, target)
        z = [t.clone().requires_grad_() for t in logits.unbind(dim=1)]
        f = [t.clone().requires_grad_() for t in features]
        criterion(MultiExitOutput(tuple(z), tuple(f)), target).backward()
        losses[ramp] = [t.grad for t in z], [t.grad for t in f]
    plain = (logits[:, 0].softmax(-1) - F.one_hot(target, C)) / B
    torch.testing.assert_close(losses['accuracy'][0][0], plain)
    assert not losses['accuracy'][1][0].any() and losses['none'][1][0].any()
    assert not torch.allclose(losses['none'][0][0], plain)
    assert losses['accuracy'][1][1].any()


def gradients(z, f, target, **kwargs):
    """Of the distillation alone, on one exit that knows everything: [B, C] and [B, N], times B."""
    criterion = MLCSDLoss(2, D, gamma=0, distill='one-for-all', **kwargs)
    if criterion.ramp is not None:
        criterion.ramp.accuracy.fill_(1.0)
        criterion.ramp.auto = False
    z, f = ([t.clone().requires_grad_() for t in parts] for parts in (z, f))
    criterion(MultiExitOutput(tuple(z), tuple(f)), target).backward()
    return (B * t[0].grad.flatten(1) for t in (z, f))


@pytest.mark.parametrize('size', [0.01, 1.0, 30.0])
def test_no_image_pulls_harder_than_a_share_of_its_label(size):
    target = torch.zeros(B, dtype=torch.long)
    # from sure and right to sure and wrong
    base = torch.linspace(-6, 6, B)[:, None] * F.one_hot(target, C)
    z = [base, base + size * torch.randn(B, C)]
    f = [torch.rand(B, D, 2, 2), size * torch.rand(B, D, 2, 2)]
    kwargs = dict(alpha=5.0, beta=10.0)
    limited = gradients(z, f, target, distill_ramp='accuracy', **kwargs)
    full = gradients(z, f, target, distill_ramp='none', **kwargs)
    pull = (base.softmax(-1) - F.one_hot(target, C)).norm(dim=1, keepdim=True)
    for ours, theirs, share in zip(limited, full, (0.5, 0.1)):  # logits, map
        bounds = share * pull
        lengths = theirs.norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours, theirs * (bounds / lengths).clamp_max(1))
        assert (lengths > bounds).any() or size < 1


def test_what_is_fitted_is_not_distilled():
    target = torch.zeros(B, dtype=torch.long)
    sure = 200.0 * F.one_hot(target, C)  # softmax rounds to the label
    features = [torch.rand(B, D, 2, 2), torch.rand(B, D, 2, 2)]
    kwargs = dict(alpha=5.0, beta=10.0, distill_ramp='accuracy')
    assert not any(g.any() for g in gradients([sure, torch.randn(B, C)], features, target, **kwargs))


def test_the_paper_has_none_and_the_scale_is_kept():
    assert MLCSDLoss(K, D).ramp is None
    criterion = MLCSDLoss(K, D, distill_ramp='accuracy')
    assert 'ramp.accuracy' in criterion.state_dict()
    with pytest.raises(ValueError, match=r"distill_ramp='x' is unknown; choose one of none, accuracy"):
        MLCSDLoss(K, D, distill_ramp='x')

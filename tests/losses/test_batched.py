"""Losses of all exits in one call equal those that are computed exit by exit."""

import pytest
import torch
import torch.nn as nn
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from timm_mlcsd.losses.batched import expand_target, is_mean_over_rows, stack_maps, sum_of_losses

B, K, C = 6, 4, 5


class Doubled(nn.CrossEntropyLoss):
    """A loss of the user."""

    def forward(self, input, target):
        """Twice the cross-entropy, plus something that is not a mean over rows."""
        return 2 * super().forward(input, target) + input.max()


HARD = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double(), label_smoothing=0.1, ignore_index=2),
    LabelSmoothingCrossEntropy(0.1),
    BinaryCrossEntropy(0.1),
    BinaryCrossEntropy(0.1, sum_classes=True, target_threshold=0.2),
]
SOFT = [nn.CrossEntropyLoss(), SoftTargetCrossEntropy(), BinaryCrossEntropy(0.0)]


@pytest.mark.parametrize('loss, soft', [*((x, False) for x in HARD), *((x, True) for x in SOFT)])
def test_one_call_equals_a_loop(loss, soft):
    logits = torch.randn(B, K, C, dtype=torch.float64, requires_grad=True)
    target = torch.rand(B, C, dtype=torch.float64).softmax(-1) if soft else torch.tensor([0, 1, 2, 3, 4, 1])
    assert is_mean_over_rows(loss)
    results = []
    for expanded in (expand_target(target, K), None):
        total = sum_of_losses(loss, logits, target, expanded, 0.7)
        results.append((total, torch.autograd.grad(total, logits)[0]))
    # sums in another order
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


OTHERS = [
    nn.CrossEntropyLoss(reduction='sum'),
    BinaryCrossEntropy(reduction='sum'),
    BinaryCrossEntropy(weight=torch.ones(B, 1)),
    Doubled(),
    AsymmetricLossMultiLabel(),
]


@pytest.mark.parametrize('loss', OTHERS)
def test_other_losses_are_called_exit_by_exit(loss):
    assert not is_mean_over_rows(loss)


def test_weights_that_differ_are_applied_exit_by_exit():
    logits, target = torch.randn(B, K, C), torch.randint(C, (B,))
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    loss = nn.CrossEntropyLoss()
    expected = sum(w * loss(logits[:, k], target) for k, w in enumerate(weights))
    found = sum_of_losses(loss, logits, target, expand_target(target, K), weights)
    torch.testing.assert_close(found, expected)


def test_maps_are_stacked_in_their_memory_order():
    maps = [torch.randn(2, 3, 4, 4) for _ in range(K)]
    for layout in (torch.contiguous_format, torch.channels_last):
        stacked = stack_maps([m.to(memory_format=layout) for m in maps])
        assert torch.equal(stacked, torch.stack(maps, dim=1))
        assert stacked.permute(0, 1, 3, 4, 2).is_contiguous() == (layout is torch.channels_last)
    assert stack_maps([m.bfloat16() for m in maps]).dtype == torch.float32

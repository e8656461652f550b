"""Teachers and losses that experiments try out, and the statistics of their weights."""

import pytest
import torch
import torch.nn.functional as F

from experiments.candidates import Dist, LogitStandardisation, Peers, PeersCWEM, StandardisedCWEM
from experiments.measure import weight_statistics
from timm_mlcsd.losses import DistillBatch, MLCSDLoss


def inputs(seed=0):
    torch.manual_seed(seed)
    return torch.randn(6, 3, 5), torch.randn(6, 3, 4), torch.randint(4, (6,))


@pytest.mark.parametrize('mixer', [Peers, PeersCWEM, StandardisedCWEM])
def test_weights_are_mixtures(mixer):
    weights = mixer(3, 5)(*inputs())
    assert weights.shape == (6, 3, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 3))
    diagonal = weights.diagonal(dim1=1, dim2=2)
    assert bool((diagonal == 0).all()) == (mixer is not StandardisedCWEM)


def test_peers_trust_the_exits_that_know_the_label():
    pooled, logits, target = inputs()
    weights = Peers(3, 5)(pooled, logits, target)
    losses = F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(3), reduction='none').view(6, 3)
    # exit 0 learns from exits 1 and 2 in the ratio exp(-CE / 0.5)
    expected = ((losses[:, 2] - losses[:, 1]) / 0.5).exp()
    torch.testing.assert_close(weights[:, 0, 1] / weights[:, 0, 2], expected)
    soft = Peers(3, 5)(pooled, logits, F.one_hot(target, 4).float())
    torch.testing.assert_close(soft, weights)


@pytest.mark.parametrize('method', [LogitStandardisation(), Dist()])
def test_losses_ignore_scale_where_their_authors_do(method):
    _, logits, target = inputs()
    student, teacher = logits, logits.flip(0)

    def loss(z, t):
        return method(DistillBatch(z, t, None, None, target, None))

    assert loss(student, teacher).shape == (3,)
    torch.testing.assert_close(loss(student, student), torch.zeros(3), atol=1e-5, rtol=0)
    assert (loss(student, teacher) > 0.01).all()
    if isinstance(method, LogitStandardisation):
        torch.testing.assert_close(loss(3 * student + 1, teacher), loss(student, teacher), atol=1e-4, rtol=1e-4)


def test_candidates_train_in_the_loss(with_candidates):
    torch.manual_seed(0)
    logits = [torch.randn(6, 4, requires_grad=True) for _ in range(3)]
    features = [torch.randn(6, 5, 2, 2) for _ in range(3)]
    for distill, method in (('standardised-cwem', 'lskd'), ('peers-cwem', 'kd'), ('peers', 'dist')):
        criterion = MLCSDLoss(3, 5, distill=distill, method=method, beta=0.0)
        parts = criterion((logits, features), torch.randint(4, (6,)), return_components=True)
        assert parts['kd'] > 0
        parts['loss'].backward()
        assert all(p.grad.abs().sum() > 0 for p in criterion.mixer.parameters() if p.ndim > 1)


def test_statistics_tell_equal_teachers_from_tailored_ones():
    equal = torch.tensor([[0.2, 0.8], [0.2, 0.8]]).expand(10, 2, 2)
    assert weight_statistics(equal) == pytest.approx(dict(rows=0, rows_per_image=0, entropy=0.7219, spread=0), abs=1e-4)
    own = torch.eye(2).expand(10, 2, 2)
    assert weight_statistics(own) == pytest.approx(dict(rows=1, rows_per_image=1, entropy=0, spread=0), abs=1e-6)
    turns = torch.stack([torch.eye(2), 1 - torch.eye(2)]).repeat(5, 1, 1)  # differ per image, not in the mean
    found = weight_statistics(turns)
    assert found['rows'] == 0 and found['rows_per_image'] == 1 and found['spread'] == pytest.approx(0.527, abs=1e-3)

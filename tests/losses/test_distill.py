"""CC, CRD and DKD against their papers' equations in float64, and what they ask of target and indices."""

import numpy as np
import pytest
import torch

from timm_mlcsd import MLCSDLoss, MultiExitOutput
from timm_mlcsd.losses import CC, CRD, DKD, KD, DistillBatch

B, K, C, D, M = 6, 3, 5, 4, 20


def batch(dtype=torch.float64, **kwargs):
    draws = dict(
        logits=torch.randn(B, K, C, dtype=dtype),
        teacher_logits=torch.randn(B, K, C, dtype=dtype),
        features=torch.randn(B, K, D, dtype=dtype),
        teacher_features=torch.randn(B, K, D, dtype=dtype),
        target=torch.randint(C, (B,)),
        indices=torch.randperm(M)[:B],
    )
    return DistillBatch(**{**draws, **kwargs})


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def divergence(t, p):
    return float((t * np.log(t / p)).sum())


def test_dkd():
    data, method = batch(), DKD(temperature=3.0, target_weight=0.7, other_weight=5.0)
    expected = np.zeros(K)
    for b in range(B):
        y = int(data.target[b])
        for k in range(K):
            p, t = (softmax(z[b, k].numpy() / 3.0) for z in (data.logits, data.teacher_logits))
            tckd = divergence(np.array([t[y], 1 - t[y]]), np.array([p[y], 1 - p[y]]))
            p_other, t_other = (np.delete(q, y) / (1 - q[y]) for q in (p, t))
            expected[k] += 9.0 * (0.7 * tckd + 5.0 * divergence(t_other, p_other)) / B
    np.testing.assert_allclose(method(data).numpy(), expected, rtol=1e-10)


def test_dkd_is_kd_with_its_own_weights():
    # KD = TCKD + (1 - p_teacher[target]) NCKD, image by image
    data = batch()
    data = DistillBatch(*(x[:1] for x in data))
    other = 1 - (data.teacher_logits / 4.0).softmax(-1)[0, :, data.target[0]]
    total = [DKD(4.0, 1.0, w)(data)[k] for k, w in enumerate(other.tolist())]
    torch.testing.assert_close(torch.stack(total), KD(4.0)(data))


def test_cc():
    data, gamma = batch(), 0.4
    expected = np.zeros(K)
    for k in range(K):
        correlations = []
        for features in (data.features, data.teacher_features):
            f = features[:, k].numpy()
            f = f / np.linalg.norm(f, axis=1, keepdims=True)
            s = f @ f.T
            correlations.append(np.exp(-2 * gamma) * (1 + 2 * gamma * s + (2 * gamma) ** 2 / 2 * s**2))
        expected[k] = ((correlations[0] - correlations[1]) ** 2).mean()
    np.testing.assert_allclose(CC()(data).numpy(), expected, rtol=1e-10)


def test_cc_series_tends_to_the_gaussian_kernel():
    x = torch.nn.functional.normalize(torch.randn(B, 1, D, dtype=torch.float64), dim=-1)
    kernel = torch.exp(-0.4 * torch.cdist(x[:, 0], x[:, 0]) ** 2)
    torch.testing.assert_close(CC(0.4, order=20)._correlation(x)[0], kernel)


def test_crd():
    method = CRD(2, D, M, embed_dim=7, negatives=9).double()
    data = batch()
    method.labels[:] = torch.randint(C, (M,))
    before, labels = method.memory.clone(), method.labels.clone()
    torch.manual_seed(5)
    drawn = torch.randint(M, (9,))
    torch.manual_seed(5)
    losses = method(data)

    weight = method.embed.weight.detach().numpy().reshape(4, 7, D)
    bias = method.embed.bias.detach().numpy().reshape(4, 7)
    embeddings = np.zeros((4, B, 7))
    for n in range(4):
        source = data.features if n < 2 else data.teacher_features
        for b in range(B):
            e = weight[n] @ source[b, n % 2].numpy() + bias[n]
            embeddings[n, b] = e / np.linalg.norm(e)
    expected = np.zeros(K)
    for n in range(4):
        other = before[(n + 2) % 4].numpy()
        same = np.array([np.exp(embeddings[n, b] @ other[data.indices[b]] / 0.07) for b in range(B)])
        apart = [
            [np.exp(embeddings[n, b] @ other[j] / 0.07) for j in drawn if labels[j] != data.target[b]] for b in range(B)
        ]
        scale = np.mean([*same, *(e for row in apart for e in row)]) * M
        for b in range(B):
            h = same[b] / scale / (same[b] / scale + 9 / M)
            expected[n % 2] -= np.log(h) / B
            for e in apart[b]:
                expected[n % 2] -= 9 / len(apart[b]) * np.log(1 - e / scale / (e / scale + 9 / M)) / B
    # the memory is made in float32
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-10)

    kept = torch.ones(M, dtype=torch.bool)
    kept[data.indices] = False
    assert torch.equal(method.memory[:, kept], before[:, kept])
    mean = before[:, data.indices].numpy() * 0.5 + embeddings * 0.5
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(method.memory[:, data.indices].numpy(), mean, rtol=1e-10)
    assert torch.equal(method.labels[data.indices], data.target)


def test_crd_estimates_its_scale_once():
    method = CRD(K, D, M, negatives=8)
    method(batch(torch.float32))
    scale = method.scale.clone()
    method(batch(torch.float32))
    assert scale.gt(0).all() and torch.equal(method.scale, scale)


def test_crd_keeps_nothing_in_eval_mode():
    method = CRD(K, D, M, negatives=8).eval()
    before = {n: t.clone() for n, t in method.state_dict().items()}
    method(batch(torch.float32))
    assert all(torch.equal(t, before[n]) for n, t in method.state_dict().items())


def test_crd_remembers_no_nan():
    method = CRD(K, D, M, negatives=8)
    method(batch(torch.float32, features=torch.full((B, K, D), float('nan'))))
    assert method.memory.isfinite().all()


def test_crd_takes_two_batches_before_one_backward():
    method = CRD(K, D, M, negatives=8)
    (method(batch(torch.float32)).sum() + method(batch(torch.float32)).sum()).backward()
    assert method.embed.weight.grad.isfinite().all()


def test_crd_learns_to_tell_images_apart():
    # features that say which image it is, in another basis for the teacher
    torch.manual_seed(0)
    student, teacher = torch.randn(M, K, 16), torch.randn(M, K, 16)
    method = CRD(K, 16, M, negatives=64)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.3)
    losses = []
    for _ in range(150):
        order = torch.randperm(M)
        data = batch(
            torch.float32, features=student[order], teacher_features=teacher[order], target=order, indices=order
        )
        loss = method(data).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def output(requires_grad=False):
    return MultiExitOutput(
        tuple(torch.randn(B, C, requires_grad=requires_grad) for _ in range(K)),
        tuple(torch.randn(B, D, 2, 3, requires_grad=requires_grad) for _ in range(K)),
    )


@pytest.mark.parametrize('distill', ['one-for-all', 'all-for-all'])
@pytest.mark.parametrize('method', ['kd', 'cc', 'crd', 'dkd'])
def test_every_method_with_both_teachers(method, distill):
    criterion = MLCSDLoss(K, D, distill=distill, method=method, beta=0, num_samples=M)
    out, target, indices = output(True), torch.randint(C, (B,)), torch.randperm(M)[:B]
    torch.manual_seed(1)
    parts = criterion(out, target, return_components=True, indices=indices)
    assert parts['loss'].item() == pytest.approx(
        sum(parts[n].item() * w for n, w in dict(cls=1, kd=criterion.method.weight, cwem=1).items() if n in parts),
        rel=1e-5,
    )
    read = out.features if criterion.method.reads_features else out.logits
    # float32 leaves about 1e-7 where a teacher equals its student
    learns = [bool(g.abs().amax() > 1e-5) for g in torch.autograd.grad(parts['kd'], read, retain_graph=True)]
    assert learns == [True] * (K - 1) + [distill == 'all-for-all']
    parts['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())


def test_teachers_of_the_methods_are_mixed():
    # DKD's teacher is t_i, CC's the pooled g_i
    out, target = output(), torch.randint(C, (B,))
    for name, method in (('dkd', DKD()), ('cc', CC())):
        criterion = MLCSDLoss(K, D, method=name).eval()
        weights = criterion.mixing_weights(out, target)
        t = torch.stack([sum(weights[:, i, k, None] * out.logits[k] for k in range(K)) for i in range(K)], 1)
        pooled = torch.stack([f.mean((2, 3)) for f in out.features], 1)
        g = torch.stack(
            [
                sum(weights[:, i, k, None, None, None] * out.features[k] for k in range(K)).mean((2, 3))
                for i in range(K)
            ],
            1,
        )
        expected = method(DistillBatch(torch.stack(out.logits, 1), t, pooled, g, target, None)).sum()
        torch.testing.assert_close(criterion(out, target, return_components=True)['kd'], expected)


@pytest.mark.parametrize('method', ['dkd', 'crd'])
def test_soft_targets_are_refused(method):
    criterion = MLCSDLoss(K, D, method=method, num_samples=M)
    with pytest.raises(ValueError, match=r'needs class indices .* switch off mixup'):
        criterion(output(), torch.rand(B, C).softmax(-1), indices=torch.arange(B))


def test_crd_asks_for_indices():
    with pytest.raises(ValueError, match='needs indices'):
        MLCSDLoss(K, D, method='crd', num_samples=M)(output(), torch.randint(C, (B,)))


def test_memory_is_kept_with_the_checkpoint():
    criterion = MLCSDLoss(K, D, method='crd', num_samples=M)
    criterion(output(), torch.randint(C, (B,)), indices=torch.arange(B))
    other = MLCSDLoss(K, D, method='crd', num_samples=M)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.method.memory, criterion.method.memory)
    assert torch.equal(other.method.labels, criterion.method.labels)


def test_alpha_zero_makes_no_method():
    criterion = MLCSDLoss(K, D, alpha=0, method='crd', num_samples=M)
    assert criterion.method is None and 'kd' not in criterion(output(), torch.randint(C, (B,)), return_components=True)

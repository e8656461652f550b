"""The loss against the paper's equations, who gets a gradient from whom, and what it works with."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from timm_mlcsd import MLCSDLoss, MultiExitOutput
from timm_mlcsd.losses import DistillBatch

B, K, C, D, H, W = 6, 4, 5, 7, 3, 2


def random_output(dtype=torch.float32, requires_grad=False, batch_size=B):
    def draw(*shape):
        return torch.randn(batch_size, *shape, dtype=dtype, requires_grad=requires_grad)

    return MultiExitOutput(tuple(draw(C) for _ in range(K)), tuple(draw(D, H, W) for _ in range(K)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def reference(criterion, output, target):
    """The equations one by one, in float64, with loops."""
    z = [t.detach().double().numpy() for t in output.logits]
    f = [t.detach().double().numpy() for t in output.features]
    y = target.numpy()
    exit_weights = criterion.exit_weights.double().numpy()
    temperature = criterion.temperature
    batch_size, num_exits = len(y), len(z)

    if criterion.distill == 'all-for-all':
        conv = criterion.mixer.conv.weight.detach().double().numpy().reshape(num_exits, num_exits, D)
        scale = criterion.mixer.norm.weight.detach().double().numpy().reshape(num_exits, num_exits)
        shift = criterion.mixer.norm.bias.detach().double().numpy().reshape(num_exits, num_exits)
        mixing = []
        for i in range(num_exits):
            x = f[i].max((2, 3)) @ conv[i].T
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale[i] + shift[i]
            mixing.append(softmax(x))
    else:
        mixing = [np.eye(num_exits)[[num_exits - 1] * batch_size]] * num_exits

    def ce(logits):
        return np.mean([-log_softmax(logits)[b, y[b]] for b in range(batch_size)])

    cls = kd = ht = cwem = 0.0
    for i in range(num_exits):
        t = sum(mixing[i][:, k, None] * z[k] for k in range(num_exits))
        g = sum(mixing[i][:, k, None, None, None] * f[k] for k in range(num_exits))
        log_p, log_t = log_softmax(z[i] / temperature), log_softmax(t / temperature)
        cls += exit_weights[i] * ce(z[i])
        kd += exit_weights[i] * temperature**2 * np.mean((np.exp(log_t) * (log_t - log_p)).sum(-1))
        ht += exit_weights[i] * np.mean((f[i] - g) ** 2)
        cwem += ce(t)
    parts = dict(cls=cls, kd=kd, ht=ht)
    total = criterion.gamma * cls + criterion.alpha * kd + criterion.beta * ht
    if criterion.distill == 'all-for-all':
        parts['cwem'] = cwem
        total += cwem
    return dict(parts, loss=total)


@pytest.mark.parametrize('exit_weights', [None, [0.5, 1.0, 2.0, 0.0]])
@pytest.mark.parametrize('distill', ['one-for-all', 'all-for-all'])
def test_equations(distill, exit_weights):
    criterion = MLCSDLoss(
        K, D, alpha=0.7, beta=1.3, gamma=0.9, temperature=3.0, distill=distill, exit_weights=exit_weights
    )
    if distill == 'all-for-all':
        nn.init.uniform_(criterion.mixer.norm.weight, 0.5, 1.5)
        nn.init.uniform_(criterion.mixer.norm.bias)
    output, target = random_output(), torch.randint(C, (B,))
    parts = criterion(output, target, return_components=True)
    expected = reference(criterion, output, target)
    assert set(parts) == set(expected)
    for name, value in expected.items():
        # float32 sums of about 1,000 terms of order 1: relative error near sqrt(1000) * 6e-8
        assert parts[name].item() == pytest.approx(value, rel=1e-5), name
    assert torch.equal(parts['loss'], criterion(output, target))


def test_paper_defaults():
    criterion = MLCSDLoss(K, D)
    assert (criterion.alpha, criterion.beta, criterion.gamma, criterion.temperature) == (5.0, 10.0, 1.0, 4.0)
    assert criterion.distill == 'all-for-all'


def test_every_term_can_be_switched():
    output, target = random_output(), torch.randint(C, (B,))

    def parts(**kwargs):
        return MLCSDLoss(K, D, **kwargs)(output, target, return_components=True)

    assert set(parts(distill='none')) == {'loss', 'cls'}
    assert set(parts(distill='one-for-all', beta=0)) == {'loss', 'cls', 'kd'}
    assert set(parts(distill='one-for-all')) == {'loss', 'cls', 'kd', 'ht'}
    assert set(parts(alpha=0)) == {'loss', 'cls', 'ht', 'cwem'}
    assert set(parts(cwem_supervision='none')) == {'loss', 'cls', 'kd', 'ht'}
    assert parts(distill='none')['loss'].item() == pytest.approx(
        sum(nn.functional.cross_entropy(z, target).item() for z in output.logits), rel=1e-6
    )
    assert parts(gamma=0, distill='none')['loss'] == 0


@pytest.mark.parametrize(
    'kwargs, trained',
    [
        (dict(distill='none'), set()),
        (dict(distill='one-for-all'), set()),
        (dict(alpha=0, beta=0), set()),
        (dict(cwem_supervision='none'), set()),
        (dict(cwem_supervision='kd', alpha=0), set()),
        (dict(feature_dim=[3, D, D, D], beta=0, distill='one-for-all'), set()),
        (dict(), {'mixer.conv.weight', 'mixer.norm.weight', 'mixer.norm.bias'}),
    ],
)
def test_no_parameter_without_a_use(kwargs, trained):
    criterion = MLCSDLoss(K, **{'feature_dim': D, **kwargs})
    assert {n for n, p in criterion.named_parameters() if p.requires_grad} == trained
    assert MLCSDLoss(1, D).mixer is None


# gradients


@pytest.mark.parametrize('distill', ['one-for-all', 'all-for-all'])
@pytest.mark.parametrize('term', ['cls', 'kd', 'ht'])
def test_gradcheck_with_constant_teachers(distill, term):
    weights = dict(cls=(0.0, 0.0, 1.0), kd=(1.0, 0.0, 0.0), ht=(0.0, 1.0, 0.0))[term]
    criterion = MLCSDLoss(K, D, alpha=weights[0], beta=weights[1], gamma=weights[2], distill=distill).double().eval()
    output, target = random_output(torch.float64, requires_grad=True), torch.randint(C, (B,))
    constant = MultiExitOutput(*(tuple(t.detach().clone() for t in part) for part in output))

    if term != 'cls':
        mixing = criterion.mixing_weights(constant, target)
        t = (mixing @ torch.stack(constant.logits, 1)).detach()
        g = (mixing @ torch.stack(constant.features, 1).flatten(2)).view(B, K, D, H, W).detach()

    def loss(*tensors):
        z, f = tensors[:K], tensors[K:]
        if term == 'cls':
            return criterion(MultiExitOutput(z, f), target)
        if term == 'kd':
            return criterion.method(DistillBatch(torch.stack(z, 1), t, None, None, target, None)).sum()
        return sum((f[i] - g[:, i]).square().mean() for i in range(K))

    tensors = (*output.logits, *output.features)
    assert torch.autograd.gradcheck(loss, tensors)
    # and the criterion's own gradient is that of a loss whose teachers are constant
    expected = torch.autograd.grad(loss(*tensors), tensors, allow_unused=True)
    actual = torch.autograd.grad(criterion(output, target, return_components=True)[term], tensors, allow_unused=True)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if e is None else e)


@pytest.mark.parametrize('distill', ['one-for-all', 'all-for-all'])
@pytest.mark.parametrize('supervision', ['ce', 'kd', 'none'])
def test_no_gradient_reaches_a_student_through_its_teacher(distill, supervision):
    # only exit 0 is a student (its weight is 1, all others 0), so whatever reaches another exit came through a teacher
    criterion = MLCSDLoss(
        K, D, gamma=0, distill=distill, cwem_supervision=supervision, exit_weights=[1.0] + [0.0] * (K - 1)
    )
    output = random_output(requires_grad=True)
    criterion(output, torch.randint(C, (B,))).backward()
    for part in output:
        assert part[0].grad.abs().sum() > 0
        assert all(t.grad is None or not t.grad.any() for t in part[1:])


@pytest.mark.parametrize('supervision, learns', [('ce', True), ('kd', True), ('none', False)])
def test_what_trains_the_cwem(supervision, learns):
    criterion = MLCSDLoss(K, D, cwem_supervision=supervision)
    before = [p.clone() for p in criterion.parameters()]
    criterion(random_output(requires_grad=True), torch.randint(C, (B,))).backward()
    for p, old in zip(criterion.parameters(), before):
        assert (p.grad is not None and bool(p.grad.any())) == learns
        assert torch.equal(p, old)


def test_cwem_learns_whom_to_trust():
    # exit 2 knows the labels, the others guess: its share in every teacher must grow from 1/4 to nearly all
    target = torch.randint(C, (64,))
    output = random_output(batch_size=64)
    logits = list(output.logits)
    logits[2] = 8.0 * nn.functional.one_hot(target, C).float()
    output = MultiExitOutput(tuple(logits), output.features)
    criterion = MLCSDLoss(K, D)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5, momentum=0.9)
    start = criterion.mixing_weights(output, target).mean(0)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(output, target).backward()
        optimizer.step()
    end = criterion.mixing_weights(output, target).mean(0)
    assert start[:, 2].max() < 0.5
    assert end[:, 2].min() > 0.8
    torch.testing.assert_close(end.sum(-1), torch.ones(K))


def test_distillation_warmup_scales_the_teachers_alone():
    output, target = random_output(), torch.randint(C, (B,))
    criterion = MLCSDLoss(K, D)
    parts = criterion(output, target, return_components=True)
    criterion.set_distill_scale(0.25)
    ramped = criterion(output, target, return_components=True)
    torch.testing.assert_close(
        ramped['loss'], parts['cls'] + parts['cwem'] + 0.25 * (5 * parts['kd'] + 10 * parts['ht'])
    )
    assert 'distill_scale' not in criterion.state_dict()


# what it works with


@pytest.mark.parametrize(
    'cls_loss', [SoftTargetCrossEntropy(), BinaryCrossEntropy(), nn.CrossEntropyLoss(label_smoothing=0.1)]
)
def test_soft_targets(cls_loss):
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=C)
    _, target = mixup(torch.randn(B, 3, 8, 8), torch.randint(C, (B,)))
    output = random_output(requires_grad=True)
    loss = MLCSDLoss(K, D, cls_loss=cls_loss)(output, target)
    loss.backward()
    assert loss.isfinite() and all(z.grad.isfinite().all() for z in output.logits)


@pytest.mark.parametrize('cls_loss', [LabelSmoothingCrossEntropy(0.1), BinaryCrossEntropy(0.1)])
def test_cls_loss_is_used_as_given(cls_loss):
    output, target = random_output(), torch.randint(C, (B,))
    expected = sum(cls_loss(z, target) for z in output.logits)
    torch.testing.assert_close(MLCSDLoss(K, D, cls_loss=cls_loss, distill='none')(output, target), expected)


@pytest.mark.parametrize('supervision', ['ce', 'kd', 'none'])
def test_batch_of_one(supervision):
    criterion = MLCSDLoss(K, D, cwem_supervision=supervision)
    before = criterion.mixer.norm.running_mean.clone()
    output = random_output(requires_grad=True, batch_size=1)
    criterion(output, torch.tensor([1])).backward()
    assert all(z.grad.isfinite().all() for z in output.logits)
    assert torch.equal(criterion.mixer.norm.running_mean, before)
    criterion.eval()(output, torch.tensor([1]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    criterion = MLCSDLoss(K, D)
    output = random_output(requires_grad=True)
    half = MultiExitOutput(*(tuple(t.detach().to(dtype).requires_grad_() for t in part) for part in output))
    full = MultiExitOutput(*(tuple(t.detach().float() for t in part) for part in half))
    target = torch.randint(C, (B,))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = criterion(half, target)
    assert loss.dtype == torch.float32
    # the same float32 arithmetic on the same rounded inputs
    torch.testing.assert_close(loss, criterion(full, target), rtol=1e-6, atol=0)
    loss.backward()
    assert half.logits[0].grad.dtype == dtype and half.logits[0].grad.isfinite().all()


def test_large_half_precision_logits_do_not_overflow():
    output = random_output(batch_size=2)
    logits = tuple((z * 1e4).half() for z in output.logits)
    features = tuple((f * 1e3).half() for f in output.features)
    assert MLCSDLoss(K, D)(MultiExitOutput(logits, features), torch.tensor([0, 1])).isfinite()


def test_float64_stays_float64():
    target = torch.randint(C, (B,))
    for distill in ('none', 'one-for-all', 'all-for-all'):
        for criterion in (MLCSDLoss(K, D, distill=distill), MLCSDLoss(K, D, distill=distill).double()):
            assert criterion(random_output(torch.float64), target).dtype == torch.float64


@pytest.mark.parametrize('distill', ['none', 'one-for-all', 'all-for-all'])
def test_compiles_in_one_graph_and_a_ramp_does_not_recompile(distill):
    torch.compiler.reset()
    criterion = MLCSDLoss(K, D, distill=distill).eval()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(criterion, backend=backend, fullgraph=True)
    output, target = random_output(), torch.randint(C, (B,))
    for scale in (0.0, 0.5, 1.0):
        criterion.set_distill_scale(scale)
        torch.testing.assert_close(compiled(output, target), criterion(output, target))
    assert len(compilations) == 1


def test_gradient_accumulation_sums_the_same_gradient():
    # without batch statistics (eval-mode CWEM), two halves average to the whole
    criterion = MLCSDLoss(K, D).eval()
    output, target = random_output(requires_grad=True), torch.randint(C, (B,))
    criterion(output, target).backward()
    whole = [z.grad.clone() for z in output.logits]
    for z in output.logits:
        z.grad = None
    for half in (slice(0, B // 2), slice(B // 2, B)):
        part = MultiExitOutput(*(tuple(t[half] for t in ts) for ts in output))
        (criterion(part, target[half]) / 2).backward()
    for z, expected in zip(output.logits, whole):
        torch.testing.assert_close(z.grad, expected)


def test_exits_of_unlike_widths_and_sizes():
    dims = [3, 5, D]
    criterion = MLCSDLoss(3, dims)
    features = (torch.randn(B, 3, 6, 4), torch.randn(B, 5, 3, 2), torch.randn(B, D, 3, 2))
    output = MultiExitOutput(tuple(torch.randn(B, C) for _ in dims), features)
    criterion(output, torch.randint(C, (B,))).backward()
    assert [type(p).__name__ for p in criterion.projections] == ['Conv2d', 'Conv2d', 'Identity']
    assert all(p.grad is not None for p in criterion.projections.parameters())


# mistakes


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(distill='some'), "distill='some' is unknown; choose one of none, one-for-all, minimum"),
        (dict(cwem_supervision='x'), "cwem_supervision='x' is unknown"),
        (dict(method='x'), "method='x' is unknown; choose one of kd, cc, crd, dkd, or pass a DistillMethod"),
        (dict(method='crd'), 'pass their number as num_samples'),
        (dict(alpha=-1), 'alpha=-1 must be finite and not negative'),
        (dict(beta=float('inf')), 'beta=inf must be finite'),
        (dict(gamma=float('nan')), 'gamma=nan must be finite'),
        (dict(temperature=0), 'temperature=0 must be positive'),
        (dict(temperature=float('inf')), 'temperature=inf must be positive and finite'),
        (dict(exit_weights=[1.0, 1.0, float('inf'), 1.0]), 'exit_weights=.* must be finite'),
        (dict(exit_weights=[0.0] * K), 'leaves no exit to train'),
        (dict(exit_weights=[1.0]), 'exit_weights has 1 numbers for 4 exits'),
        (dict(cls_loss=JsdCrossEntropy()), 'compares augmented copies'),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MLCSDLoss(K, D, **kwargs)


def test_wrong_number_of_exits_is_named():
    with pytest.raises(ValueError, match='output is one tensor, as a model returns in evaluation mode'):
        MLCSDLoss(K, D)(torch.randn(B, C), torch.randint(C, (B,)))
    with pytest.raises(ValueError, match='must stay in float32'):
        MLCSDLoss(K, D).bfloat16()(random_output(torch.bfloat16), torch.randint(C, (B,)))
    criterion = MLCSDLoss(K + 1, D)
    with pytest.raises(ValueError, match='output has 4 exits, the loss was made for num_exits=5'):
        criterion(random_output(), torch.randint(C, (B,)))
    with pytest.raises(ValueError, match=r"distill='none' has no teacher"):
        MLCSDLoss(K, D, distill='none').mixing_weights(random_output(), torch.zeros(B, dtype=torch.long))

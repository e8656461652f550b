"""Risk control: the tests are valid, and what they certify holds on new samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from timm_mlcsd.adaptive import RISKS, ExitPolicy, calibrate, evaluate_policy, run_calibration
from timm_mlcsd.adaptive.evaluate import CachedLogits
from timm_mlcsd.adaptive.exit_rates import geometric_sweep
from timm_mlcsd.adaptive.risk import _betting, _binomial, _Losses, images_needed, lowest_limit, split
from timm_mlcsd.adaptive.samples import FitSamples

COSTS = [1.0, 2.0, 3.0, 4.0]


def sampled(num_samples, seed, noise=1.0):
    """Logits of four exits that get better with depth, and labels."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(5, (num_samples,), generator=generator)
    logits = noise * torch.randn(4, num_samples, 5, generator=generator)
    ease = torch.rand(num_samples, generator=generator)
    for k in range(4):
        logits[k, torch.arange(num_samples), targets] += 1.5 + 0.6 * k + 3 * ease
    return logits, targets


def test_binomial_tail_by_hand():
    assert _binomial(_Losses(0, 0, 100), 0.03) == pytest.approx(0.97**100)
    expected = sum(math.comb(50, k) * 0.1**k * 0.9 ** (50 - k) for k in range(4))
    assert _binomial(_Losses(3, 0, 50), 0.1) == pytest.approx(expected)
    # float64 has no 0.5**5000, the sum of these terms is near 1/2
    assert _binomial(_Losses(2500, 0, 5000), 0.5) == pytest.approx(0.5, abs=0.01)


def test_no_sample_is_no_evidence():
    assert _binomial(_Losses(0, 0, 0), 0.05) == 1 and _betting(_Losses(0, 0, 0), 0.05, 0.5) == 1


def test_early_answers_that_are_often_wrong_are_not_certified():
    """Half of the first exit's answers are wrong whatever its score, so no limit of 5% holds where images leave."""
    certified = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(5, (1000,), generator=generator)
        wrong = torch.rand(1000, generator=generator) < 0.5
        logits = torch.randn(2, 1000, 5, generator=generator)
        answers = torch.where(wrong, (targets + 1) % 5, targets)
        logits[0, torch.arange(1000), answers] += 8 * torch.rand(1000, generator=generator) + 3
        logits[1, torch.arange(1000), targets] += 5
        for method in ('quantile', 'exit_rates'):
            try:
                calibrate(logits, targets, [1.0, 2.0], max_drop=5.0, risk='selective', method=method)
                certified += 1
            except ValueError:
                pass
    assert certified <= 4  # 5% of 40 are 2


def test_a_path_begins_carefully():
    """With many samples, a small limit is certified, though the first sweep of exit rates stops a third early."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (20_000,), generator=generator)
    logits = torch.randn(2, 20_000, 5, generator=generator)
    for k, strength in enumerate((1.0, 2.5)):
        logits[k, torch.arange(20_000), targets] += strength
    policy = calibrate(logits, targets, [1.0, 2.0], max_drop=1.0)
    assert 1.5 < evaluate_policy(logits, targets, [1.0, 2.0], policy).cost < 1.98


def test_patience_is_certified():
    policy = calibrate(*sampled(1000, 0), COSTS, max_drop=8.0, score='patience')
    assert set(policy.thresholds) <= {1.0, 2.0, 3.0} and evaluate_policy(*sampled(1000, 1), COSTS, policy).cost < 3.5


@pytest.mark.parametrize(
    'kwargs', [dict(max_drop=0.0, confidence=None), dict(budget=1.0), dict(budget=1.0, method='shrunk')]
)
def test_ends_of_the_range_are_met_with_many_samples(kwargs):
    """Thresholds are searched for on a part of 30,000 samples, and all of them meet the goal."""
    data = sampled(30_000, 0)
    result = evaluate_policy(*data, COSTS, calibrate(*data, COSTS, **kwargs))
    whole = evaluate_policy(*data, COSTS, ExitPolicy([math.inf] * 3)).accuracy
    assert result.cost <= 1 + 1e-9 if 'budget' in kwargs else result.accuracy >= whole - 1e-9


def test_accuracy_is_that_of_the_labels():
    logits, targets = sampled(500, 0)
    found = run_calibration(logits, targets.roll(1), COSTS, max_drop=5.0, risk='disagreement')
    assert found.accuracy < 40


def test_betting_is_a_test_of_the_mean():
    # exactly: the mean capital over all outcomes of one sample is 1 where the mean loss is the limit
    limit, bet = 0.1, 0.7
    for lost in (0.1, 0.3, 0.55):
        gained = lost - limit
        outcomes = [(lost, _Losses(1, 0, 1)), (gained, _Losses(0, 1, 1)), (1 - lost - gained, _Losses(0, 0, 1))]
        capital = sum(p * math.exp(math.log1p(bet * (limit - (x.lost - x.gained)))) for p, x in outcomes)
        assert capital == pytest.approx(1)
    # the p-value is the inverse of the capital of all samples, at most 1
    losses = _Losses(2, 5, 100)
    capital = (1 + bet * (limit - 1)) ** 2 * (1 + bet * (limit + 1)) ** 5 * (1 + bet * limit) ** 93
    assert _betting(losses, limit, bet) == pytest.approx(1 / capital)
    assert _betting(_Losses(60, 0, 100), limit, bet) == 1


def test_fresh_samples_are_apart_from_those_that_fit():
    for count in (2, 5, 37, 240, 100_000):
        fit, fresh = split(count)
        assert sorted([*fit, *fresh]) == list(range(count)) and len(fit) and len(fresh)
    assert len(split(1_000_000)[0]) == 10_000


@pytest.mark.parametrize('limit, confidence', [(1.0, 0.95), (5.0, 0.9), (0.01, 0.99)])
def test_number_of_images_that_an_error_names_is_the_least(limit, confidence):
    needed = images_needed(limit, confidence)
    assert lowest_limit(len(split(needed)[1]), confidence) <= limit
    assert lowest_limit(len(split(needed - 1)[1]), confidence) > limit


@pytest.mark.parametrize('risk', RISKS)
def test_risk_on_new_samples_is_within_the_limit(risk):
    """60 calibrations at 80%: at most 20% may exceed the limit, 12 of 60; 21 or more have a probability of 0.5%."""
    new = sampled(20_000, 10**6)
    last = new[0][-1].argmax(-1)
    exceeded, saved, refused = 0, 0.0, 0
    for seed in range(60):
        try:
            policy = calibrate(*sampled(300, seed), COSTS, max_drop=4.0, confidence=0.8, risk=risk)
        except ValueError:  # an unlucky draw certifies nothing
            refused += 1
            continue
        result = evaluate_policy(*new, COSTS, policy)
        right, early = result.prediction == new[1], result.exit_index < 3
        true = {
            'drop': (last == new[1]).double().mean() - right.double().mean(),
            'selective': (~right[early]).double().mean(),
            'disagreement': (result.prediction != last).double().mean(),
        }[risk]
        exceeded += bool(100 * true > 4.0)
        saved += (4 - result.cost) / 60
    assert exceeded <= 20 and refused <= 12
    assert saved > 0.5  # of 4: a policy that never stops early would be within every limit


def test_without_a_certificate_the_limit_is_exceeded():
    """What the certificate is for: thresholds that are best on few samples break their promise on new ones."""
    new = sampled(20_000, 10**6)
    whole = evaluate_policy(*new, COSTS, ExitPolicy([math.inf] * 3)).accuracy
    drops = []
    for seed in range(20):
        policy = calibrate(*sampled(300, seed), COSTS, max_drop=1.0, confidence=None)
        assert policy.certificate is None
        drops.append(whole - evaluate_policy(*new, COSTS, policy).accuracy)
    assert sum(drop > 1.0 for drop in drops) > 15


def test_disagreement_needs_no_labels():
    logits, targets = sampled(500, 3)
    ours = calibrate(logits, None, COSTS, max_drop=5.0, risk='disagreement', temperatures='fit')
    assert ours.certificate['risk'] == 'disagreement' and ours.temperatures[-1] == 1
    assert evaluate_policy(logits, targets, COSTS, ours).cost < 4
    # labels change the temperatures alone
    plain = (calibrate(logits, y, COSTS, max_drop=5.0, risk='disagreement') for y in (None, targets))
    assert next(plain) == next(plain)


def test_certifying_samples_do_not_fit_anything():
    """Other labels change no temperature and no weight, only the policy of the path that is reached."""
    logits, targets = sampled(400, 5)
    _, fresh = split(400)
    changed = targets.clone()
    changed[fresh] = logits[0, fresh].argmax(-1)
    kwargs = dict(max_drop=3.0, temperatures='fit', weights='fit', aggregate='fitted')
    found = [calibrate(logits, y, COSTS, **kwargs) for y in (targets, changed)]
    assert found[0].temperatures == found[1].temperatures and found[0].weights == found[1].weights
    assert found[0].thresholds != found[1].thresholds


def test_a_certificate_belongs_to_its_thresholds():
    policy = calibrate(*sampled(400, 0), COSTS, max_drop=5.0)
    assert policy.certificate['images'] == 320 and policy.certificate['confidence'] == 0.95
    assert ExitPolicy.from_dict(policy.to_dict()) == policy and hash(policy) is not None
    assert policy.with_thresholds([0.5, 0.5, 0.5]).certificate is None
    with pytest.raises(ValueError, match='certificate: expected the one of these thresholds'):
        replace(policy, temperatures=(2.0,) * 4)
    assert policy.without_digest().certificate is None
    for change in (dict(risk='luck'), dict(limit=101.0), dict(images=0), dict(confidence=True), dict(more=1)):
        with pytest.raises(ValueError, match='certificate'):
            ExitPolicy.from_dict({**policy.to_dict(), 'certificate': {**policy.certificate, **change}})


@pytest.mark.parametrize(
    'count, kwargs, message',
    [
        (240, dict(max_drop=1.0), r'240 images \(48 to fit, 192 to certify\) .* 1.55 points .* give 374 images'),
        (240, dict(max_drop=0.0), r'max_drop=0: .* confidence 0.95; allow more'),
        (240, dict(max_drop=-3.0), r'max_drop=-3: .* confidence 0.95; allow more'),
        (240, dict(max_drop=math.inf), 'max_drop=inf: expected percentage points, a number from -100 to 100'),
        (240, dict(max_drop=1e-310), 'confidence 0.95; allow more'),
        (10, dict(max_drop=5.0), r'10 images \(5 to fit, 5 to certify\) .* give 79 images'),
        (1, dict(max_drop=5.0, temperatures='fit'), '1 image cannot certify anything; give more'),
        (240, dict(max_drop=5.0, confidence=1.0), 'confidence=1.0: expected a number from 0.5 to below 1'),
        (240, dict(max_drop=5.0, confidence='high'), "confidence='high': expected a number"),
        (240, dict(max_drop=5.0, risk='luck'), "risk='luck' is unknown; choose one of drop, selective, disagreement"),
        (240, dict(budget=2.0, risk='selective'), "risk='selective': expected max_drop"),
        (240, dict(max_drop=5.0, confidence=None, risk='selective'), 'expected a confidence, got None'),
        (240, dict(max_drop=5.0, temperatures='guess'), "temperatures='guess': expected numbers, 'fit' or None"),
    ],
)
def test_what_cannot_be_certified(count, kwargs, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*sampled(count, 0), COSTS, **kwargs)


def test_too_many_losses_are_an_error():
    logits, targets = sampled(300, 0)
    logits[:3] = -logits[:3]  # sure and wrong
    with pytest.raises(ValueError, match=r'if no sample is lost; under the most careful of \d+ policies too many are'):
        calibrate(logits, targets, COSTS, max_drop=1.3)


def test_labels_are_needed_for_the_drop():
    with pytest.raises(ValueError, match="targets=None: expected labels; only risk='disagreement' does without"):
        calibrate(sampled(300, 0)[0], None, COSTS, max_drop=5.0)


def test_equal_exits_are_certified_to_stop_at_the_first():
    logits, targets = sampled(500, 0)
    policy = calibrate(logits[:1].expand(4, -1, -1), targets, COSTS, max_drop=1.0)
    assert evaluate_policy(logits[:1].expand(4, -1, -1), targets, COSTS, policy).cost < 1.3


def test_budget_reports_its_optimism():
    found = [run_calibration(*sampled(150, seed, noise=2.0), COSTS, budget=2.0) for seed in range(10)]
    assert all(f.cost <= 2 and f.method in ('exit_rates', 'shrunk', 'optimal', 'quantile') for f in found)
    # thresholds that were fitted to the samples look better on them, in the mean
    assert sum(f.accuracy - f.cross_validated[0] for f in found) > 0
    assert all(abs(f.cross_validated[1] - 2) < 0.3 for f in found)
    assert run_calibration(*sampled(150, 0), COSTS, budget=2.0, method='optimal').cross_validated is None


def test_chosen_method_is_not_worse_than_exit_rates_on_new_samples():
    """At equal cost, along the sweep of exit rates; the standard error of the mean gain is about 0.03 points."""
    new = FitSamples(CachedLogits(*sampled(20_000, 10**6, noise=1.5)))
    template = ExitPolicy([0.0] * 3)
    gains = []
    for seed in range(30):
        data = sampled(200, seed, noise=1.5)
        sweep = geometric_sweep(FitSamples(CachedLogits(*data)), template)
        costs, accuracies = zip(*sorted(new.evaluate(policy, COSTS)[1::-1] for policy in sweep))
        for budget in (1.8, 2.6):
            result = new.evaluate(calibrate(*data, COSTS, budget=budget), COSTS)
            gains.append(result.accuracy - np.interp(result.cost, costs, accuracies))
    assert sum(gains) / len(gains) > -0.05

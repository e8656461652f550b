import itertools
import math

import pytest
import torch

from timm_mlcsd.adaptive import (
    SCORES,
    THRESHOLD_METHODS,
    ExitPolicy,
    budgeted_curve,
    calibrate,
    confidence_bins,
    evaluate_policy,
    expected_calibration_error,
    fit_temperatures,
    fit_weights,
    thresholds_for_exit_rates,
)
from timm_mlcsd.cost import ExitCost, ExitTime

INF = math.inf


def made_up(num_exits=4, num_samples=300, num_classes=10, seed=0):
    """Logits of exits that get better with depth, on samples some of which are harder."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (num_samples,), generator=generator)
    ease = torch.randn(num_samples, generator=generator)
    logits = torch.randn(num_exits, num_samples, num_classes, generator=generator)
    for k in range(num_exits):
        logits[k, torch.arange(num_samples), targets] += (0.8 * k + 1 + 1.5 * ease).clamp_min(0)
    return logits, targets


def logits_of(confidences):
    """Two-class logits with these confidences in class 0."""
    p = torch.tensor(confidences).double()
    return torch.stack([p.log(), (1 - p).log()], -1)


COSTS = [1.0, 2.0, 3.0, 4.0]


def test_exit_rates_by_hand():
    logits = logits_of([[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9], [0.9] * 4])
    policy = thresholds_for_exit_rates(logits, [0.5, 0.25, 0.25])
    # the second surest of four, then the surest of the two that are left
    assert policy.thresholds == pytest.approx((0.8, 0.9))
    result = evaluate_policy(logits, torch.tensor([0, 0, 1, 0]), [1, 2, 4], policy)
    assert result.exit_index.tolist() == [0, 0, 2, 1]
    assert result.exit_fractions == [0.5, 0.25, 0.25]
    assert (result.cost, result.accuracy) == (2.0, 75.0)


def test_exits_without_a_share_or_without_samples_stay_off():
    logits = logits_of([[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9], [0.9] * 4])
    assert thresholds_for_exit_rates(logits, [0.2, 0.3, 0.5]).thresholds == pytest.approx((INF, 0.9))
    ties = logits_of([[0.8] * 4, [0.7] * 4, [0.9] * 4])
    # all four leave with the first, none are left for the second
    assert thresholds_for_exit_rates(ties, [0.25, 0.25, 0.5]).thresholds == pytest.approx((0.8, INF))


@pytest.mark.parametrize(
    'rates', [[0.5, 0.5], [0.5, 0.2, 0.2], [1.5, -0.5, 0], [float('nan')] * 3, '100', [True, False, False]]
)
def test_rates_that_are_none(rates):
    with pytest.raises(ValueError, match='expected 3 shares, one per exit, that sum to 1'):
        thresholds_for_exit_rates(torch.zeros(3, 2, 2), rates)


def test_all_samples_leave_somewhere_once():
    logits, targets = made_up()
    for seed in range(20):
        thresholds = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        result = evaluate_policy(logits, targets, COSTS, ExitPolicy(thresholds))
        confidence, prediction = logits.softmax(-1).max(-1)
        left = [next((k for k in range(3) if confidence[k, n] >= thresholds[k]), 3) for n in range(300)]
        assert result.exit_index.tolist() == left
        assert result.prediction.tolist() == [prediction[k, n].item() for n, k in enumerate(left)]
        assert result.cost == pytest.approx(sum(COSTS[k] for k in left) / 300)


def test_exits_that_are_off_cost_no_head():
    costs = [ExitCost(11, 0, 10, 1, 1), ExitCost(23, 0, 10, 2, 1), ExitCost(36, 0, 10, 3, 1)]
    logits, targets = made_up(3)
    assert evaluate_policy(logits, targets, costs, ExitPolicy([5.0, 5.0])).cost == 36
    assert evaluate_policy(logits, targets, costs, ExitPolicy([INF, 5.0])).cost == 35
    assert evaluate_policy(logits, targets, costs, ExitPolicy([INF, INF])).cost == 33


def test_one_threshold_is_the_best_there_is():
    logits, targets = made_up(2, 60)
    confidence = logits[0].softmax(-1).amax(-1)
    tries = [ExitPolicy([t]) for t in (*confidence.tolist(), INF)]
    results = [evaluate_policy(logits, targets, [1, 3], p) for p in tries]
    for budget in (1.0, 1.3, 1.7, 2.0, 2.6, 3.0):
        best = max(r.accuracy for r in results if r.cost <= budget + 1e-9)
        ours = evaluate_policy(
            logits, targets, [1, 3], calibrate(logits, targets, [1, 3], budget=budget, method='optimal')
        )
        assert ours.cost <= budget + 1e-9 and ours.accuracy == pytest.approx(best)


@pytest.mark.parametrize('score, aggregate', list(itertools.product(SCORES, ('last', 'mean'))))
def test_optimal_is_never_below_the_sweep(score, aggregate):
    data = made_up()
    for point in budgeted_curve(data, data, COSTS, score=score, aggregate=aggregate)[::6]:
        budget = point.val.cost
        for method in THRESHOLD_METHODS:
            policy = calibrate(*data, COSTS, budget=budget, method=method, score=score, aggregate=aggregate)
            result = evaluate_policy(*data, COSTS, policy)
            assert result.cost <= budget + 1e-9
            if method == 'optimal':
                assert result.accuracy >= point.val.accuracy


def test_cheapest_within_a_drop():
    data = made_up()
    whole = evaluate_policy(*data, COSTS, ExitPolicy([INF] * 3)).accuracy
    costs = []
    for drop in (0.0, 1.0, 3.0, 100.0):
        result = evaluate_policy(*data, COSTS, calibrate(*data, COSTS, max_drop=drop, confidence=None))
        assert result.accuracy >= whole - drop - 1e-9
        costs.append(result.cost)
    assert costs == sorted(costs, reverse=True) and costs[0] < 4 and costs[-1] == 1


def test_the_search_gains_much_over_the_sweep():
    data = made_up(8, 2000)
    costs = list(range(1, 9))
    gains = []
    for budget in (2.0, 3.0, 4.0):
        ours, theirs = (
            evaluate_policy(*data, costs, calibrate(*data, costs, budget=budget, method=method)).accuracy
            for method in ('optimal', 'exit_rates')
        )
        gains.append(ours - theirs)
    assert min(gains) > 0.3


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(budget=0.5), r'budget=0.5 is out of reach: expected a mean cost from 1 to 4'),
        (dict(max_drop=-50, confidence=None), r'max_drop=-50 is out of reach: expected at least'),
        (dict(), 'expected exactly one of the two'),
        (dict(budget=1, max_drop=1), 'expected exactly one of the two'),
        (dict(budget=2, method='magic'), "method='magic' is unknown; choose one of optimal"),
        (dict(budget=2, score='luck'), "score: expected one of confidence, .*got 'luck'"),
        (dict(budget=math.nan), 'budget=nan: expected a number'),
        (dict(budget=True), 'budget=True: expected a number'),
        (dict(max_drop='1'), "max_drop='1': expected a number"),
    ],
)
def test_what_cannot_be_calibrated(kwargs, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*made_up(), COSTS, **kwargs)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda z, y: (z.index_fill(1, torch.tensor([7]), float('nan')), y), 'not finite, first at exit 0, sample 7'),
        (lambda z, y: (z.index_fill(1, torch.tensor([7]), INF), y), 'exit 0, sample 7, where the largest is inf'),
        (lambda z, y: (z.index_fill(1, torch.tensor([7]), -INF), y), 'exit 0, sample 7, where the largest is -inf'),
        (lambda z, y: (z > 0, y), 'type torch.bool; expected real numbers'),
        (lambda z, y: ([*z[:3], z[3, 1:]], y), r'expected one tensor \[samples, classes\] per exit'),
        (lambda z, y: (z, y > 0), 'expected 300 integers'),
        (lambda z, y: (z[:, :0], y[:0]), 'expected .exits, samples, classes., none of them 0'),
        (lambda z, y: (z, y[1:]), 'expected 300 integers'),
        (lambda z, y: (z, y.float()), 'expected 300 integers'),
        (lambda z, y: (z, y + 1), 'targets are in 1..10; expected 0..9 for 10 classes'),
        (lambda z, y: (z[:3], y), '3 exits'),
    ],
)
def test_data_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_policy(*change(*made_up()), COSTS, ExitPolicy([0.5] * 3))


@pytest.mark.parametrize(
    'costs',
    [
        [1, 2, 3],
        [1, 2, 3, 2],
        [1, 2, 3, float('nan')],
        [1, 2, 3, INF],
        [-1, 2, 3, 4],
        [False, True, True, True],
        '1234',
        [[1], [2], [3], [4]],
        [ExitCost(1, 0, 1, 0, 1), 2, 3, 4],
        [ExitCost(1, 0, math.nan, 0, 1)] * 4,
        [ExitTime(1.0, -1.0)] * 4,
    ],
)
def test_costs_that_do_not_fit(costs):
    with pytest.raises(ValueError, match='costs'):
        evaluate_policy(*made_up(), costs, ExitPolicy([0.5] * 3))


@pytest.mark.parametrize('num_samples', [1, 2, 3])
def test_tiny_sets(num_samples):
    data = made_up(3, num_samples)
    policy = calibrate(*data, [1, 2, 3], budget=2)
    assert evaluate_policy(*data, [1, 2, 3], policy).cost <= 2 + 1e-9
    assert len(budgeted_curve(data, data, [1, 2, 3])) == 39


def test_one_exit_has_nothing_to_calibrate():
    data = made_up(1)
    assert calibrate(*data, [1.0], budget=1).thresholds == ()


def test_temperature_is_found():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 10, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    stretched = torch.stack([logits, 2.5 * logits, 0.5 * logits])
    # 4,000 samples: the estimate of a temperature has a standard error of about 2%
    assert fit_temperatures(stretched, targets) == pytest.approx((1.0, 2.5, 0.5), rel=0.06)
    before = expected_calibration_error(stretched, targets)
    after = expected_calibration_error(stretched, targets, fit_temperatures(stretched, targets))
    assert before[1] > 10 and max(after) < 3


def test_temperature_of_a_set_that_is_all_right_is_a_number():
    logits = 20 * torch.nn.functional.one_hot(torch.arange(5), 5).float()[None]
    assert 0 < fit_temperatures(logits, torch.arange(5))[0] < INF


def test_few_samples_that_are_all_right_do_not_make_every_confidence_one():
    # two thirds of the mass on the label, 48 times; without a prior the temperature would go to 0
    logits = logits_of([[0.667] * 48])
    temperature = fit_temperatures(logits, torch.zeros(48, dtype=torch.long))[0]
    assert 0.1 < temperature < 0.5
    # the minimum of 48 NLL(T) + (log T)^2 / 2, over a grid
    grid = torch.linspace(-3, 1, 4001, dtype=torch.float64)
    losses = [-48 * (logits[0, 0].double() / t.exp()).log_softmax(-1)[0] + t**2 / 2 for t in grid]
    assert math.log(temperature) == pytest.approx(grid[int(torch.stack(losses).argmin())].item(), abs=0.002)


def test_calibration_error_by_hand():
    logits = logits_of([[0.9, 0.9, 0.6, 0.6]])
    # 0.9 is right half the time, 0.6 always
    error = expected_calibration_error(logits, torch.tensor([0, 1, 0, 0]), bins=10)
    assert error == pytest.approx([100 * (0.5 * 0.4 + 0.5 * 0.4)])


@pytest.mark.parametrize('how', [dict(aggregate='mean'), dict(score='patience'), dict()])
def test_exit_rates_hold_where_exits_are_off(how):
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 400, 4)
    policy = thresholds_for_exit_rates(logits, [0.0, 0.5, 0.5], **how)
    targets = torch.zeros(400, dtype=torch.long)
    found = evaluate_policy(logits, targets, [1, 2, 3], policy).exit_fractions
    # patience has few values: all with one of them leave together
    expected = [0.0, 1.0, 0.0] if how.get('score') == 'patience' else [0.0, 0.5, 0.5]
    assert found == pytest.approx(expected, abs=0.01)


def test_fits_what_comes_from_inference_mode():
    with torch.inference_mode():
        logits, targets = torch.randn(2, 50, 3, dtype=torch.float64), torch.arange(50) % 3
        inside = fit_temperatures(logits, targets), fit_weights(logits, targets)
    assert inside == (fit_temperatures(logits.clone(), targets.clone()), fit_weights(logits.clone(), targets.clone()))


@pytest.mark.parametrize('value, largest', [(INF, 'inf'), (math.nan, 'nan')])
def test_nothing_is_fitted_to_logits_that_are_not_finite(value, largest):
    logits, targets = made_up(3)
    logits[1, 4, 2] = value
    for fit in (
        fit_temperatures,
        fit_weights,
        confidence_bins,
        expected_calibration_error,
        lambda z, y: calibrate(z, y, COSTS[:3], max_drop=1, confidence=None),
        lambda z, y: budgeted_curve((z, y), (z, y), COSTS[:3]),
        lambda z, y: thresholds_for_exit_rates(z, [0.5, 0.25, 0.25]),
        lambda z, y: evaluate_policy(z, y, COSTS[:3], ExitPolicy([0.5, 0.5])),
    ):
        with pytest.raises(ValueError, match=f'exit 1, sample 4, where the largest is {largest}'):
            fit(logits, targets)


def test_classes_that_cannot_be_are_as_if_they_were_not_there():
    logits, targets = made_up(3)
    wider = torch.cat([logits, torch.full((3, 300, 1), -INF)], -1)
    assert fit_temperatures(wider, targets) == pytest.approx(fit_temperatures(logits, targets), rel=1e-6)
    for ours, theirs in zip(fit_weights(wider, targets), fit_weights(logits, targets)):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = (
        calibrate(z, targets, COSTS[:3], max_drop=1, confidence=None, aggregate='mean') for z in (wider, logits)
    )
    assert ours.thresholds == pytest.approx(theirs.thresholds, rel=1e-6)
    with pytest.raises(ValueError, match='label is -inf, first at exit 0, sample 0'):
        fit_temperatures(wider, targets.fill_(10))


def test_logits_that_temperatures_make_infinite_are_refused():
    logits, targets = made_up(2)
    logits[0, 3] *= 1e37
    policy = ExitPolicy([0.5], temperatures=[1e-4, 1.0])
    with pytest.raises(ValueError, match='first at exit 0, sample 3'):
        evaluate_policy(logits, targets, [1, 2], policy)


def test_reliability_wants_temperatures_and_bins_that_fit():
    logits, targets = made_up(3)
    with pytest.raises(ValueError, match='temperatures: expected a list of 3 positive numbers'):
        confidence_bins(logits, targets, [1.0, 1.0])
    with pytest.raises(ValueError, match=r'temperatures: expected a number from 0\.0001 to 10000, got 0'):
        fit_weights(logits, targets, [1.0, 0, 1.0])
    with pytest.raises(ValueError, match='bins=0'):
        confidence_bins(logits, targets, bins=0)
    assert confidence_bins(logits, targets, torch.ones(3)) == confidence_bins(logits, targets)

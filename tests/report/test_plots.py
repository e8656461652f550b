"""Plots and intervals."""

import pytest
from scipy.stats import binomtest

from timm_mlcsd.report import accuracy_interval, plot_accuracy_against_cost


@pytest.mark.parametrize('right, count', [(0, 10), (7, 10), (355, 360), (360, 360)])
def test_interval_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(method='wilson')
    assert accuracy_interval(100 * right / count, count) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-4
    )


def test_plot_starts_at_no_cost_and_shows_the_plain_backbone(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, path: (drawn.append(self), save(self, path)))
    exits = [(1.0, 80.0), (1.05, 90.0), (4.0, 97.0)]
    plot_accuracy_against_cost(tmp_path / 'a.png', exits, 100, backbone=(3.9, 97.0), title='net')
    axes = drawn[0].axes[0]
    assert (tmp_path / 'a.png').stat().st_size > 1000 and axes.get_xlim()[0] == 0
    assert axes.get_legend_handles_labels()[1] == ['exits', 'plain backbone']
    renderer = drawn[0].canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    # no label lies on an interval
    to_pixels = axes.transData.transform
    for cost, accuracy in [*exits, (3.9, 97.0)]:
        ends = [to_pixels((cost, bound)) for bound in accuracy_interval(accuracy, 100)]
        for box in boxes:
            crosses = box.x0 < ends[0][0] < box.x1 and box.y0 < ends[1][1] and box.y1 > ends[0][1]
            assert not crosses

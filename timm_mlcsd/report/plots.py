"""Plots with matplotlib (extra ``[plot]``)."""

from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

from .intervals import accuracy_interval

__all__ = ['plot_accuracy_against_cost']

# pixels that a label needs
LABEL_WIDTH = 32
LABEL_HEIGHT = 16
LABEL_GAP = 6


def plot_accuracy_against_cost(
    path: Union[str, Path],
    exits: Sequence[Tuple[float, float]],
    num_images: int,
    backbone: Optional[Tuple[float, float]] = None,
    title: str = '',
    others: Optional[Mapping[str, Tuple[float, float]]] = None,
) -> None:
    """Plot the accuracy of every exit against its cost, with confidence intervals of 95%.

    Args:
        path: PNG file to write.
        exits: Cost in MMACs and accuracy in percent per exit, [K].
        num_images: Number of images that the accuracies were measured on.
        backbone: Cost and accuracy of the plain backbone; default: not shown.
        title: Title of the figure; default: none.
        others: Cost and accuracy of further networks by name; default: none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _points(axes, exits, num_images, fmt='o', label='exits')
    if backbone is not None:
        _points(axes, [backbone], num_images, fmt='s', label='plain backbone')
    for name, point in (others or {}).items():
        _points(axes, [point], num_images, fmt='D', label=name if len(name) <= 40 else f'... {name[-36:]}')
    axes.legend(loc='lower right')
    axes.set_xlim(left=0)
    axes.set_xlabel('MMACs to answer')
    axes.set_ylabel('top-1 accuracy (%), with 95% confidence intervals')
    axes.set_title(title)
    axes.margins(y=0.15)
    figure.draw_without_rendering()
    _label(axes, exits, [*exits, *([backbone] if backbone else []), *(others or {}).values()], num_images)
    figure.savefig(path)


def _points(axes: Any, points: Sequence[Tuple[float, float]], num_images: int, **style: Any) -> None:
    costs, accuracies = zip(*points)
    bounds = [accuracy_interval(accuracy, num_images) for accuracy in accuracies]
    below = [accuracy - low for accuracy, (low, _) in zip(accuracies, bounds)]
    above = [high - accuracy for accuracy, (_, high) in zip(accuracies, bounds)]
    axes.errorbar(costs, accuracies, yerr=(below, above), capsize=3, elinewidth=1, **style)


def _label(
    axes: Any, exits: Sequence[Tuple[float, float]], points: Sequence[Tuple[float, float]], num_images: int
) -> None:
    """Write the names of the exits above the intervals of all points that are near, one above the other."""
    pixels = [axes.transData.transform((cost, accuracy_interval(accuracy, num_images)[1])) for cost, accuracy in points]
    taken: List[Tuple[float, float]] = []
    for k in range(len(exits)):
        x = pixels[k][0]
        top = max(py for px, py in pixels if abs(px - x) < LABEL_WIDTH / 2) + LABEL_GAP
        while any(abs(px - x) < LABEL_WIDTH and abs(py - top) < LABEL_HEIGHT for px, py in taken):
            top += LABEL_HEIGHT
        taken.append((x, top))
        axes.annotate(
            f'Ex{k + 1}',
            (x, top),
            xycoords='figure pixels',
            ha='center',
            va='bottom',
            fontsize=8,
            annotation_clip=False,
        )

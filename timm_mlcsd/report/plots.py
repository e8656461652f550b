"""Plots with matplotlib (extra ``[plot]``)."""

from pathlib import Path
from typing import Mapping, Sequence, Tuple, Union

__all__ = ['plot_accuracy_against_cost']


def plot_accuracy_against_cost(
    path: Union[str, Path],
    curves: Mapping[str, Sequence[Tuple[float, float]]],
    title: str = '',
) -> None:
    """Plot accuracy in percent against MMACs, one point per exit (paper, Figs. 2 and 3).

    Args:
        path: PNG file to write.
        curves: Points (MMACs, accuracy) of each network, by its name.
        title: Title of the figure; default: none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points), marker='o', label=name)
        if len(curves) == 1:
            for k, point in enumerate(points, 1):
                axes.annotate(f'Ex{k}', point, xytext=(0, 7), textcoords='offset points', ha='center', fontsize=8)
    axes.set_xlabel('MMACs to answer')
    axes.set_ylabel('top-1 accuracy (%)')
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path)

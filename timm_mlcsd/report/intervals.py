"""Confidence intervals of accuracies."""

import math
from typing import Tuple

__all__ = ['accuracy_interval']

# quantile of the normal distribution for 95%
Z = 1.959964


def accuracy_interval(accuracy: float, count: int) -> Tuple[float, float]:
    """Wilson's score interval of an accuracy, at 95% (Wilson, J. Am. Stat. Assoc. 22, 1927).

    Args:
        accuracy: Accuracy in percent.
        count: Number of images that it was measured on, at least 1.

    Returns:
        Lower and upper bound in percent.
    """
    share, z2 = accuracy / 100, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)

"""Results for people: tables and figures."""

from .plots import plot_accuracy_against_cost
from .tables import format_table

__all__ = ['format_table', 'plot_accuracy_against_cost']

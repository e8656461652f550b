"""Reports: tables, plots, model cards and HTML pages."""

from .intervals import accuracy_interval
from .model_card import check_license, is_own_card, model_card
from .page import write_page
from .plots import plot_accuracy_against_cost
from .tables import format_table

__all__ = [
    'accuracy_interval',
    'check_license',
    'format_table',
    'is_own_card',
    'model_card',
    'plot_accuracy_against_cost',
    'write_page',
]

"""What people read: tables, plots, model cards."""

from .model_card import model_card
from .page import write_page
from .plots import plot_accuracy_against_cost
from .tables import format_table

__all__ = ['format_table', 'model_card', 'plot_accuracy_against_cost', 'write_page']

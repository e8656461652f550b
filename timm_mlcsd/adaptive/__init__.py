"""Early exit at run time: policies, their calibration, and the runtime."""

from .calibrate import METHODS, CurvePoint, budgeted_curve, calibrate, thresholds_for_exit_rates
from .evaluate import PolicyResult, evaluate_policy
from .exported import ExportedModel
from .policy import AGGREGATES, SCORES, ExitPolicy
from .runtime import AdaptiveModel, Prediction
from .temperature import confidence_bins, expected_calibration_error, fit_temperatures, fit_weights

__all__ = [
    'AGGREGATES',
    'METHODS',
    'SCORES',
    'AdaptiveModel',
    'CurvePoint',
    'ExitPolicy',
    'ExportedModel',
    'PolicyResult',
    'Prediction',
    'budgeted_curve',
    'calibrate',
    'confidence_bins',
    'evaluate_policy',
    'expected_calibration_error',
    'fit_temperatures',
    'fit_weights',
    'thresholds_for_exit_rates',
]

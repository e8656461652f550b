"""Early-exit inference: exit policies, their calibration, and the runtime."""

from .calibrate import THRESHOLD_METHODS, CurvePoint, budgeted_curve, calibrate, thresholds_for_exit_rates
from .evaluate import PolicyResult, evaluate_policy
from .exported import ExportedModel
from .policy import AGGREGATES, SCORES, ExitPolicy
from .runtime import AdaptiveModel, Prediction
from .scaling import confidence_bins, expected_calibration_error, fit_temperatures, fit_weights

__all__ = [
    'AGGREGATES',
    'THRESHOLD_METHODS',
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

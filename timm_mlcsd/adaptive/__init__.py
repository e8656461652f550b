"""Early exit at run time: policies, their calibration, and the runtime."""

from .calibrate import METHODS, CurvePoint, budgeted_curve, calibrate, thresholds_for_exit_rates
from .evaluate import PolicyResult, evaluate_policy
from .policy import AGGREGATES, POLICY_FILE, SCORES, ExitPolicy
from .runtime import AdaptiveModel, Prediction
from .temperature import expected_calibration_error, fit_temperatures, fit_weights

__all__ = [
    'AGGREGATES',
    'METHODS',
    'POLICY_FILE',
    'SCORES',
    'AdaptiveModel',
    'CurvePoint',
    'ExitPolicy',
    'PolicyResult',
    'Prediction',
    'budgeted_curve',
    'calibrate',
    'evaluate_policy',
    'expected_calibration_error',
    'fit_temperatures',
    'fit_weights',
    'thresholds_for_exit_rates',
]

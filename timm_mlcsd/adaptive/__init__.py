"""Early-exit inference: exit policies, their calibration, and the runtime."""

from .calibrate import THRESHOLD_METHODS, Calibration, CurvePoint, budgeted_curve, calibrate, run_calibration
from .evaluate import PolicyResult, evaluate_policy
from .exit_rates import thresholds_for_exit_rates
from .exported import ExportedModel
from .policy import AGGREGATES, SCORES, ExitPolicy
from .risk import RISKS
from .runtime import AdaptiveModel, Prediction
from .scaling import confidence_bins, expected_calibration_error, fit_temperatures, fit_weights

__all__ = [
    'AGGREGATES',
    'RISKS',
    'THRESHOLD_METHODS',
    'SCORES',
    'AdaptiveModel',
    'Calibration',
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
    'run_calibration',
    'thresholds_for_exit_rates',
]

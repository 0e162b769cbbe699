"""Detectors: a score turned into a decision with a known error rate."""

from ood_scores.detector.calibrate import calibrate
from ood_scores.detector.detector import Detector
from ood_scores.detector.feature_monitor import FeatureMonitor
from ood_scores.detector.monitor import Monitor
from ood_scores.detector.prediction import Prediction
from ood_scores.scorers.fusion import Fusion

__all__ = ["Detector", "FeatureMonitor", "Fusion", "Monitor", "Prediction", "calibrate"]

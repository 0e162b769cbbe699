"""Detectors: a score turned into a decision with a known error rate."""

from ood_scores.detector.calibrate import calibrate
from ood_scores.detector.detector import Detector
from ood_scores.detector.fusion import Fusion
from ood_scores.detector.monitor import Monitor
from ood_scores.detector.prediction import Prediction

__all__ = ["Detector", "Fusion", "Monitor", "Prediction", "calibrate"]

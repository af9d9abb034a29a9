"""Predictions of a trained model, and how often they are right."""

from keras_vmoe.evaluation.measurement import Measurement
from keras_vmoe.evaluation.measurement import measure
from keras_vmoe.evaluation.measurement import report
from keras_vmoe.evaluation.prediction import classify

__all__ = [
    "Measurement",
    "classify",
    "measure",
    "report",
]

"""What a trained model says: classes of images."""

from keras_vmoe.evaluation.prediction import Prediction
from keras_vmoe.evaluation.prediction import classify

__all__ = ["Prediction", "classify"]

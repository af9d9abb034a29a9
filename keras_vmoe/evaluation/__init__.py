"""Predictions of a trained model, and their accuracy."""

from keras_vmoe.evaluation.ablation import ablate
from keras_vmoe.evaluation.comparison import Comparison
from keras_vmoe.evaluation.comparison import compare
from keras_vmoe.evaluation.features import extract_features
from keras_vmoe.evaluation.fewshot import FewShot
from keras_vmoe.evaluation.fewshot import choose_l2
from keras_vmoe.evaluation.fewshot import few_shot
from keras_vmoe.evaluation.imagenet import IMAGENET_A
from keras_vmoe.evaluation.imagenet import IMAGENET_R
from keras_vmoe.evaluation.imagenet_sets import Robustness
from keras_vmoe.evaluation.imagenet_sets import robustness
from keras_vmoe.evaluation.measurement import Measurement
from keras_vmoe.evaluation.measurement import measure
from keras_vmoe.evaluation.measurement import report
from keras_vmoe.evaluation.prediction import classify
from keras_vmoe.evaluation.probing import LinearProbe
from keras_vmoe.evaluation.probing import linear_probe
from keras_vmoe.evaluation.sweeping import sweep_routing

__all__ = [
    "IMAGENET_A",
    "IMAGENET_R",
    "Comparison",
    "FewShot",
    "LinearProbe",
    "Measurement",
    "Robustness",
    "ablate",
    "choose_l2",
    "classify",
    "compare",
    "extract_features",
    "few_shot",
    "linear_probe",
    "measure",
    "report",
    "robustness",
    "sweep_routing",
]

"""Inspection of the experts: router statistics and plots."""

from keras_vmoe.inspection._plots import plot_history
from keras_vmoe.inspection.gathering import LayerInspection
from keras_vmoe.inspection.inspecting import Inspection
from keras_vmoe.inspection.inspecting import inspect
from keras_vmoe.inspection.patches import class_counts
from keras_vmoe.inspection.patches import class_weight
from keras_vmoe.inspection.patches import experts_per_image
from keras_vmoe.inspection.patches import patch_counts
from keras_vmoe.inspection.patches import patches_cdf
from keras_vmoe.inspection.patches import similarity
from keras_vmoe.inspection.patches import spatial_share
from keras_vmoe.inspection.patches import top_experts
from keras_vmoe.inspection.statistics import reset_routing_statistics
from keras_vmoe.inspection.statistics import routing_statistics

__all__ = [
    "Inspection",
    "LayerInspection",
    "class_counts",
    "class_weight",
    "experts_per_image",
    "inspect",
    "patch_counts",
    "patches_cdf",
    "plot_history",
    "reset_routing_statistics",
    "routing_statistics",
    "similarity",
    "spatial_share",
    "top_experts",
]

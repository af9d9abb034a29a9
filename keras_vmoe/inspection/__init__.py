"""What the experts do: statistics of the routers, and pictures of them."""

from keras_vmoe.inspection.plots import load_heatmap
from keras_vmoe.inspection.plots import plot_history
from keras_vmoe.inspection.statistics import reset_routing_statistics
from keras_vmoe.inspection.statistics import routing_statistics

__all__ = [
    "load_heatmap",
    "plot_history",
    "reset_routing_statistics",
    "routing_statistics",
]

"""What the experts do: statistics of the routers, and plots of them."""

from keras_vmoe.inspection._plots import plot_history
from keras_vmoe.inspection.statistics import reset_routing_statistics
from keras_vmoe.inspection.statistics import routing_statistics

__all__ = [
    "plot_history",
    "reset_routing_statistics",
    "routing_statistics",
]

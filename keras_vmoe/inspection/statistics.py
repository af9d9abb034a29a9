"""The routers' statistics of any model that holds MoE layers."""

from keras_vmoe import layers


def routing_statistics(model):
    """What each MoE layer did in training since the last reset.

    Args:
        model: Any Keras model with `MoEMLP` layers, nested ones included.

    Returns:
        Dict from layer name to a dict with `auxiliary_loss` and
        `dropped_share`, floats, and `load_share`, a numpy array `(E,)`: means
        over the training steps. Layers that took no step are left out.

    Example:

    >>> routing_statistics(keras.Sequential([keras.layers.Dense(2)]))
    {}
    """
    found = {
        layer.name: layer.router.statistics.result()
        for layer in moe_layers(model)
    }
    return {name: result for name, result in found.items() if result}


def reset_routing_statistics(model):
    """Starts the statistics of all MoE layers of a model anew.

    Args:
        model: Any Keras model.

    Example:

    >>> reset_routing_statistics(keras.Sequential([keras.layers.Dense(2)]))
    """
    for layer in moe_layers(model):
        layer.router.statistics.reset()


def moe_layers(model):
    """The `MoEMLP` layers of a model or layer, nested ones included."""
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, layers.MoEMLP):
            found.append(layer)
    return found

"""Initializers, regularizers and constraints: one expert's, for all experts."""

import keras
import numpy as np
from keras import initializers as init
from keras import ops

# Each number is drawn by itself, whatever the shape.
ELEMENTWISE = (
    init.Constant,
    init.Ones,
    init.RandomNormal,
    init.RandomUniform,
    init.TruncatedNormal,
    init.Zeros,
)
# Of the biases of V-MoE's MLPs; a config, of which each layer makes its own.
BIAS_INITIALIZER = {"class_name": "RandomNormal", "config": {"stddev": 1e-6}}
KINDS = {
    "initializer": init,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


def set_options(layer, **options):
    """Keeps options such as `kernel_initializer` as attributes of a layer.

    Args:
        layer: A Keras layer.
        **options: Names, objects or configs that Keras knows; the last word of
            an option's name says which kind it is.
    """
    for name, value in options.items():
        kind = KINDS[name.rpartition("_")[2]]
        setattr(layer, name, kind.get(value))


def get_options(layer, prefix):
    """The options of a layer for one weight, as arguments of `add_weight`.

    An initializer is copied: one object draws the same numbers every time.
    """
    options = {kind: getattr(layer, f"{prefix}_{kind}") for kind in KINDS}
    initializer = options["initializer"]
    if isinstance(initializer, init.Initializer):
        options["initializer"] = initializer.clone()
    return options


def options_config(layer, *prefixes):
    """The options of a layer for its config, by their full names."""
    return {
        f"{prefix}_{kind}": module.serialize(getattr(layer, f"{prefix}_{kind}"))
        for prefix in prefixes
        for kind, module in KINDS.items()
    }


def for_each_expert(initializer, regularizer, constraint):
    """The same for stacked weights `(E, ...)`: each expert as if it were alone.

    Keras would take a stacked kernel `(E, D, F)` for that of a convolution.
    """
    return {
        "initializer": _initialize_each(initializer),
        "regularizer": regularizer and _RegularizeEach(regularizer),
        "constraint": constraint and _ConstrainEach(constraint),
    }


def _initialize_each(initializer):
    def initialize(shape, dtype=None):
        if isinstance(initializer, ELEMENTWISE):
            return initializer(shape, dtype=dtype)
        if isinstance(initializer, init.VarianceScaling) and len(shape) == 3:
            scaling = init.VarianceScaling(
                initializer.scale,
                initializer.mode,
                initializer.distribution,
                initializer.seed,
                input_axes=(1,),
                output_axes=(2,),
            )
            return scaling(shape, dtype=dtype)
        alone = _with_seeds(initializer, shape[0])
        return ops.stack([draw(shape[1:], dtype=dtype) for draw in alone])

    return initialize


def _with_seeds(initializer, count):
    """Initializers for so many experts: one seed would make them equal."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return [initializer] * count
    config, seeds = initializer.get_config(), np.random.default_rng(seed)
    return [
        type(initializer).from_config({**config, "seed": int(seed)})
        for seed in seeds.integers(2**31, size=count)
    ]


class _RegularizeEach(keras.regularizers.Regularizer):
    """The sum of the experts' penalties."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def __call__(self, x):
        weights = ops.unstack(ops.convert_to_tensor(x))
        return sum(self.regularizer(w) for w in weights)


class _ConstrainEach(keras.constraints.Constraint):
    """The constraint, applied to the weights of each expert."""

    def __init__(self, constraint):
        self.constraint = constraint

    def __call__(self, x):
        weights = ops.unstack(ops.convert_to_tensor(x))
        return ops.stack([self.constraint(w) for w in weights])

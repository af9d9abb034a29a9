"""Initializers, regularizers and constraints, applied expert by expert."""

import keras
import numpy as np
from keras import initializers as init
from keras import ops

# Keras's initializers that draw each number independently of the shape. They
# are compared by `__call__`, which a subclass may override.
ELEMENTWISE = {
    kind.__call__
    for kind in (
        init.Constant,
        init.Ones,
        init.RandomNormal,
        init.RandomUniform,
        init.TruncatedNormal,
        init.Zeros,
    )
}
# For the biases of V-MoE's MLPs; a config: each layer makes its own object.
BIAS_INITIALIZER = {"class_name": "RandomNormal", "config": {"stddev": 1e-6}}
KINDS = {
    "initializer": init,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


def mark(variables, part):
    """Marks the part of a model that variables belong to, for optimizers.

    Args:
        variables: Keras variables.
        part: `"gate"`, `"expert"` or `"positions"`.
    """
    for variable in variables:
        variable.vmoe_part = part


def part_of(variable):
    """Returns the part that `mark` set for a variable, or None."""
    return getattr(variable, "vmoe_part", None)


def set_options(layer, **options):
    """Stores options such as `kernel_initializer` as attributes of a layer.

    Args:
        layer: A Keras layer.
        **options: Names, objects or configs that Keras knows; the last word of
            an option's name is its kind.
    """
    for name, value in options.items():
        kind = KINDS[name.rpartition("_")[2]]
        setattr(layer, name, kind.get(value))


def get_options(layer, prefix, index=0):
    """Returns a layer's options for one weight, as in `add_weight`.

    An initializer is copied: one object draws the same numbers every time.

    Args:
        layer: A Keras layer.
        prefix: `"kernel"` or `"bias"`.
        index: Index of the weight among those with these options. Each draws
            different numbers, even if the initializer has a seed.
    """
    options = {kind: getattr(layer, f"{prefix}_{kind}") for kind in KINDS}
    initializer = options["initializer"]
    if not isinstance(initializer, init.Initializer):
        return options
    seed = initializer.get_config().get("seed")
    if index and isinstance(seed, int):
        seed = int(np.random.default_rng([seed, index]).integers(2**31))
        options["initializer"] = _with_seed(initializer, seed)
    elif not seed or isinstance(seed, int):  # Else a generator: it moves on.
        options["initializer"] = initializer.clone()
    return options


def options_config(layer, *prefixes):
    """Returns a layer's options for its config, by full name."""
    return {
        f"{prefix}_{kind}": module.serialize(getattr(layer, f"{prefix}_{kind}"))
        for prefix in prefixes
        for kind, module in KINDS.items()
    }


def small_normal():
    """The initializer of ConvNeXt's convolutions and Swin's attention."""
    return init.TruncatedNormal(stddev=0.02)


def for_each_expert(initializer, regularizer, constraint):
    """Adapts options to stacked weights `(E, ...)`, as if experts were alone.

    Keras would treat a stacked kernel `(E, D, F)` as a convolution.
    """
    return {
        "initializer": _initialize_each(initializer),
        "regularizer": regularizer and _RegularizeEach(regularizer),
        "constraint": constraint and _ConstrainEach(constraint),
    }


def _initialize_each(initializer):
    def initialize(shape, dtype=None):
        draws = type(initializer).__call__
        if draws in ELEMENTWISE:
            return initializer(shape, dtype=dtype)
        if draws is init.VarianceScaling.__call__ and len(shape) == 3:
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
    """Returns one initializer per expert: one seed would make them equal."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return [initializer] * count
    seeds = np.random.default_rng(seed).integers(2**31, size=count)
    return [_with_seed(initializer, int(seed)) for seed in seeds]


def _with_seed(initializer, seed):
    """Returns a copy of an initializer with another seed."""
    config = {**initializer.get_config(), "seed": seed}
    return type(initializer).from_config(config)


class _RegularizeEach(keras.regularizers.Regularizer):
    """The sum of the experts' penalties."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def __call__(self, x):
        # Not unstacked: experts sharded over devices stay there.
        x = ops.convert_to_tensor(x)
        return ops.sum(ops.vectorized_map(self.regularizer, x))


class _ConstrainEach(keras.constraints.Constraint):
    """The constraint, applied to the weights of each expert."""

    def __init__(self, constraint):
        self.constraint = constraint

    def __call__(self, x):
        return ops.vectorized_map(self.constraint, ops.convert_to_tensor(x))

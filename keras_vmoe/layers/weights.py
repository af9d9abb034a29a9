"""Initializers, regularizers and constraints: one expert's, for all experts."""

import keras
import numpy as np
from keras import initializers as init
from keras import ops

# Of Keras, those that draw each number by itself, whatever the shape. Compared
# by their call, for which a subclass may have its own.
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
# Of the biases of V-MoE's MLPs; a config, of which each layer makes its own.
BIAS_INITIALIZER = {"class_name": "RandomNormal", "config": {"stddev": 1e-6}}
KINDS = {
    "initializer": init,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


def mark(variables, part):
    """Says of what part of a model variables are, for optimizers.

    Args:
        variables: Keras variables.
        part: `"gate"`, `"expert"` or `"positions"`.
    """
    for variable in variables:
        variable.vmoe_part = part


def part_of(variable):
    """What `mark` has said of a variable; None for all others."""
    return getattr(variable, "vmoe_part", None)


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


def get_options(layer, prefix, index=0):
    """The options of a layer for one weight, as arguments of `add_weight`.

    An initializer is copied: one object draws the same numbers every time.

    Args:
        layer: A Keras layer.
        prefix: `"kernel"` or `"bias"`.
        index: Which of the layer's weights of these options. They differ, even
            if the initializer has a seed.
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
    """The options of a layer for its config, by their full names."""
    return {
        f"{prefix}_{kind}": module.serialize(getattr(layer, f"{prefix}_{kind}"))
        for prefix in prefixes
        for kind, module in KINDS.items()
    }


def small_normal():
    """The initializer of ConvNeXt's convolutions and of Swin's attention."""
    return init.TruncatedNormal(stddev=0.02)


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
    """Initializers for so many experts: one seed would make them equal."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return [initializer] * count
    seeds = np.random.default_rng(seed).integers(2**31, size=count)
    return [_with_seed(initializer, int(seed)) for seed in seeds]


def _with_seed(initializer, seed):
    """A copy of an initializer with another seed."""
    config = {**initializer.get_config(), "seed": seed}
    return type(initializer).from_config(config)


class _RegularizeEach(keras.regularizers.Regularizer):
    """The sum of the experts' penalties."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def __call__(self, x):
        # Not unstacked: experts that are spread over devices stay there.
        x = ops.convert_to_tensor(x)
        return ops.sum(ops.vectorized_map(self.regularizer, x))


class _ConstrainEach(keras.constraints.Constraint):
    """The constraint, applied to the weights of each expert."""

    def __init__(self, constraint):
        self.constraint = constraint

    def __call__(self, x):
        return ops.vectorized_map(self.constraint, ops.convert_to_tensor(x))

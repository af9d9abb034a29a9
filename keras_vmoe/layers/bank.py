"""Requirements of a MoE layer on its expert bank."""

import keras

# The arguments that `MoEMLP` passes on to its default bank.
BANK = {
    "activation",
    "dropout",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "kernel_constraint",
    "bias_constraint",
    "use_output_bias",
    "seed",
}


def check_bank(experts, num_experts):
    """Raises unless this is a layer whose `num_experts`, if any, matches."""
    if not isinstance(experts, keras.layers.Layer):
        raise ValueError(
            "`experts` must be a Keras layer from buffers (groups, experts, "
            "capacity, features) to the same shape, or None. "
            f"Received: experts={experts!r}. Write `layers.MLPExperts(...)`."
        )
    own = getattr(experts, "num_experts", num_experts)
    if own != num_experts:
        raise ValueError(
            "Bank and layer must have the same number of experts. "
            f"Received: experts.num_experts={own} and "
            f"num_experts={num_experts}. Give both the same number."
        )


def check_built(experts, num_experts, features):
    """Raises if a bank was built for buffers that do not fit a layer."""
    config = experts.get_build_config() or {}
    shape = config.get("input_shape")
    if shape and (shape[1], shape[-1]) != (num_experts, features):
        raise ValueError(
            "One bank serves layers of one feature width, with as many experts."
            f" Received: experts={experts.name!r}, built for {shape[1]} experts"
            f" of {shape[-1]} features, in a layer of {num_experts} experts of "
            f"{features} features. Make a bank for this layer."
        )


def check_weights(experts, num_experts):
    """Raises unless the matrices of a built bank are stacked by expert."""
    for weight in experts.weights:
        shape = tuple(weight.shape)
        if len(shape) > 1 and shape[0] != num_experts:
            raise ValueError(
                "Weights of an expert bank with two or more axes must start "
                f"with an axis of {num_experts} experts. Received: "
                f"{weight.path!r} of shape {shape}. Stack the experts' weights."
            )


def check_output(outputs, expected, name):
    """Raises unless a bank kept the shape, where it is known."""
    shape = getattr(outputs, "shape", None)
    pairs = zip(shape or (), expected, strict=False)
    fits = all(None in pair or len(set(pair)) == 1 for pair in pairs)
    if shape is None or len(shape) != len(expected) or not fits:
        got = tuple(shape) if shape is not None else type(outputs).__name__
        raise ValueError(
            "An expert bank must return the shape it was given. Received: "
            f"{got} for buffers of {tuple(expected)} from {name!r}. Project "
            "back to the features."
        )


def check_settings_of(experts, settings):
    """Raises for settings that conflict with a given bank."""
    for name, value in settings.items():
        if value not in (None, getattr(experts, name, None)):
            raise ValueError(
                f"A bank brings its own `{name}`. Received: {name}={value!r} "
                f"together with experts={experts.name!r}. Set it on the bank."
            )

"""Forward passes and training steps of a layer, compiled as users run them."""

import keras
from keras import ops


def forward(layer, inputs):
    """A compiled forward pass of a layer, without arguments."""
    inputs = ops.convert_to_tensor(inputs)
    if keras.backend.backend() == "jax":
        step, arguments = jax_forward(layer, inputs)
        return lambda: step(*arguments)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda x: layer(x, training=False))
        return lambda: step(inputs)
    import torch

    def step():
        with torch.no_grad():
            return layer(inputs, training=False)

    return step


def training(layer, inputs):
    """A compiled forward and backward pass of a layer, without arguments.

    The gradient of the mean square of the outputs, and of the auxiliary
    losses, with respect to the inputs and all weights; no optimizer.
    """
    inputs = ops.convert_to_tensor(inputs)
    if keras.backend.backend() == "jax":
        step, arguments = jax_training(layer, inputs)
        return lambda: step(*arguments)
    if keras.backend.backend() == "tensorflow":
        return _tensorflow_training(layer, inputs)
    return _torch_training(layer, inputs)


def jax_forward(layer, inputs):
    """A jitted forward pass and its arguments."""
    import jax

    @jax.jit
    def step(trainable, other, inputs):
        return layer.stateless_call(trainable, other, inputs)[0]

    return step, (*_values(layer), inputs)


def jax_training(layer, inputs):
    """A jitted training step and its arguments."""
    import jax

    def loss(trainable, inputs, other):
        outputs, _, losses = layer.stateless_call(
            trainable, other, inputs, training=True, return_losses=True
        )
        return ops.mean(ops.square(outputs)) + sum(losses)

    trainable, other = _values(layer)
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return step, (trainable, inputs, other)


def _values(layer):
    return (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


def _tensorflow_training(layer, inputs):
    import tensorflow as tf

    # A variable of tf_keras has a method where Keras 3 has a property.
    weights = [
        v.value if isinstance(v, keras.Variable) else v
        for v in layer.trainable_variables
    ]

    @tf.function
    def step(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            loss = tf.reduce_mean(tf.square(outputs)) + sum(layer.losses)
        return tape.gradient(loss, [inputs, *weights])

    return lambda: step(inputs)


def _torch_training(layer, inputs):
    import torch

    leaf = inputs.clone().requires_grad_(True)
    weights = [w for w in layer.parameters() if w.requires_grad]

    def step():
        outputs = layer(leaf, training=True)
        loss = torch.mean(torch.square(outputs)) + sum(layer.losses)
        return torch.autograd.grad(loss, [leaf, *weights])

    return step

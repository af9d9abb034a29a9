"""One MoE layer against a dense MLP of the same FLOPs, forward and training.

    KERAS_BACKEND=jax python benchmarks/moe_layer.py

Both run in the same process, in turn. The dense MLP has K times the experts'
hidden size, which is what a token of the MoE layer passes through. At capacity
factor 1.05 the MoE layer's experts do 1.056 times the dense MLP's
multiplications: the capacity is rounded up to whole multiples of 4 places.

Training is the gradient of a squared error with respect to the inputs and all
weights, without an optimizer, with noise and auxiliary losses.
"""

import argparse
import pathlib

import interleaved
import keras
import numpy as np
from keras import ops

from keras_vmoe import layers

RESULTS = pathlib.Path(__file__).parent / "results" / "moe_layer.csv"


def main():
    """Measures, prints a table and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--selected", type=int, default=2)
    parser.add_argument("--capacity-factor", type=float, default=1.05)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    shape = (args.images, args.tokens, args.features)
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")
    candidates = make_layers(args)
    for layer in candidates.values():
        layer.build(shape)
    table = []
    for kind, make in (("forward", forward), ("training", training)):
        functions = {
            name: make(layer, inputs) for name, layer in candidates.items()
        }
        seconds = interleaved.measure(functions, args.rounds)
        table += interleaved.rows(seconds, "dense", **{"pass": kind})
    interleaved.print_table(table)
    if args.save:
        setting = {k: v for k, v in vars(args).items() if k != "save"}
        columns = {**interleaved.versions(), "setting": setting}
        interleaved.write(RESULTS, [{**columns, **row} for row in table])


def make_layers(args):
    """The layers to compare, by name; `dense` is the baseline."""

    def moe(batch_priority):
        router = layers.TopKRouter(
            args.experts,
            args.selected,
            capacity_factor=args.capacity_factor,
            batch_priority=batch_priority,
        )
        return layers.MoEMLP(
            args.experts, args.hidden, router, activation="gelu_tanh"
        )

    return {
        "dense": layers.MLP(
            args.selected * args.hidden, activation="gelu_tanh"
        ),
        "moe": moe(False),
        "moe bpr": moe(True),
    }


def forward(layer, inputs):
    """A compiled forward pass of a layer, without arguments."""
    inputs = ops.convert_to_tensor(inputs)
    if keras.backend.backend() == "jax":
        import jax

        state = _values(layer)

        @jax.jit
        def step(trainable, other, inputs):
            return layer.stateless_call(trainable, other, inputs)[0]

        return lambda: step(*state, inputs)
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
    """A compiled forward and backward pass of a layer, without arguments."""
    inputs = ops.convert_to_tensor(inputs)
    if keras.backend.backend() == "jax":
        import jax

        state = _values(layer)

        def loss(trainable, inputs, other):
            outputs, _, losses = layer.stateless_call(
                trainable, other, inputs, training=True, return_losses=True
            )
            return ops.mean(ops.square(outputs)) + sum(losses)

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: step(state[0], inputs, state[1])
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        weights = [v.value for v in layer.trainable_variables]

        @tf.function
        def step(inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=True)
                loss = ops.mean(ops.square(outputs)) + sum(layer.losses)
            return tape.gradient(loss, [inputs, *weights])

        return lambda: step(inputs)

    import torch

    leaf = inputs.clone().requires_grad_(True)
    weights = [v.value for v in layer.trainable_variables]

    def step():
        outputs = layer(leaf, training=True)
        loss = ops.mean(ops.square(outputs)) + sum(layer.losses)
        return torch.autograd.grad(loss, [leaf, *weights])

    return step


def _values(layer):
    """Values of the trainable and the other variables of a layer."""
    return (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


if __name__ == "__main__":
    main()

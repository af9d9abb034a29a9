"""A MoE layer inside a small convolutional network of one's own.

    KERAS_BACKEND=jax python examples/moe_in_your_model.py --epochs 15

Trains on the embedded digits and prints the test accuracy, the share of the
choices that each expert got in the last epoch and the share that was dropped.
"""

import argparse

import keras

from keras_vmoe import data
from keras_vmoe import layers
from keras_vmoe import training


def make_model(num_classes):
    """A convolutional stem, one MoE layer on its 7 x 7 positions, a head."""
    images = keras.Input((28, 28, 3))
    x = keras.layers.Conv2D(48, 4, strides=4, activation="gelu")(images)
    y = keras.layers.LayerNormalization()(x)
    router = layers.TopKRouter(
        num_experts=4, num_selected_experts=1, capacity_factor=1.25
    )
    y = layers.MoEMLP(4, hidden_dim=96, router=router, name="moe")(y)
    x = keras.layers.Add()([x, y])  # A token that is dropped keeps its x.
    x = keras.layers.Conv2D(96, 3, strides=2, activation="gelu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(x))


def main():
    """Trains, evaluates and prints what the experts did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs

    keras.utils.set_random_seed(0)
    train = data.load("digits", "train", 28, 64, training=True)
    test = data.load("digits", "test", 28, 64, training=False)
    model = make_model(num_classes=10)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    routing = training.callbacks.RoutingHistory()
    model.fit(
        train, epochs=epochs, shuffle=False, verbose=2, callbacks=[routing]
    )
    moe = routing.epochs[-1]["moe"]
    print("load per expert:", " ".join(f"{x:.3f}" for x in moe["load_share"]))
    print(f"dropped share: {moe['dropped_share']:.3f}")
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()

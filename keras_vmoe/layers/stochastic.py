"""Layers for residual branches, and random seeds that are saved."""

from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import check_dropout
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_seed
from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.distribution import _replicas

SEED_KEY = "seed_state_0"
REPLICA_STEP = 0x9E3779B9  # Keeps the seeds of two replicas far apart.


class SeedGenerator(keras.random.SeedGenerator):
    """Seeds that differ between the replicas of tf.distribute.

    The replicas share the generator's state. Keras's own distributions draw
    noise for the whole batch, and no seeds need to differ.
    """

    def next(self, ordered: bool = True) -> Tensor:
        seed = super().next(ordered)
        replica = _replicas.replica_id()
        if replica is None:
            return seed
        step = ops.cast(replica, seed.dtype) * REPLICA_STEP
        return seed + ops.stack([step, ops.zeros_like(step)])


class SavesSeedState:
    """Mixin: `.keras` and weights files keep the state of `seed_generator`.

    Keras saves models without it: a resumed run would repeat the noise of the
    first epoch. Files without the state also load and leave the seeds
    unchanged.
    """

    seed_generator: keras.random.SeedGenerator | None = None

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)  # type: ignore[misc]  # The layer's.
        if self.seed_generator is not None:
            store[SEED_KEY] = self.seed_generator.state

    def load_own_variables(self, store: Any) -> None:
        weights = {key: store[key] for key in store.keys() if key != SEED_KEY}
        super().load_own_variables(weights)  # type: ignore[misc]  # Its.
        if self.seed_generator is not None and SEED_KEY in store.keys():
            self.seed_generator.state.assign(store[SEED_KEY])


def drop(x, rate, seed_generator, noise_shape=None):
    """Applies `keras.random.dropout`, or nothing at a rate of 0."""
    if rate == 0:
        return x
    # Without a noise shape Keras on PyTorch ignores the layer's seed.
    noise_shape = noise_shape or ops.shape(x)
    return keras.random.dropout(x, rate, noise_shape, seed=seed_generator)


@keras.saving.register_keras_serializable("keras_vmoe", name="Dropout")
class SeededDropout(SavesSeedState, keras.layers.Layer):
    """`keras.layers.Dropout` whose seed state is saved with the model.

    Keras's own layer makes a generator that no file stores and that replicas
    share. A second generator next to it would add an extra variable.

    Args:
        rate: Share of the values set to 0 in training, in `[0, 1]`.
        noise_shape: Optional shape that the noise is broadcast from.
        seed: Optional integer seed.

    Example:

    >>> SeededDropout(0.1)(keras.ops.ones((2, 3))).shape
    (2, 3)
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Shape | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_dropout(rate=rate)
        check_seed(seed)
        self.rate = rate
        self.noise_shape = plain(noise_shape)
        self.seed = plain(seed)
        self.supports_masking = True
        self.built = True  # As in Keras's: `quantize` may be called on it.
        if rate > 0:
            self.seed_generator = SeedGenerator(self.seed)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        rate = self.rate if training else 0
        return drop(inputs, rate, self.seed_generator, self.noise_shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "rate": self.rate,
            "noise_shape": self.noise_shape,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class DropPath(SavesSeedState, keras.layers.Layer):
    """Drops a residual branch for a random subset of the images.

    In training, each image's branch is set to 0 with probability `rate`; the
    other branches are divided by `1 - rate`.

    Args:
        rate: Probability of dropping a branch, in `[0, 1)`.
        seed: Optional integer seed.

    Call arguments:
        inputs: `(B, ...)` float tensor, the output of a residual branch.
        training: Whether to drop.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If `rate` is outside `[0, 1)`.

    Example:

    >>> DropPath(0.2)(keras.ops.ones((4, 3, 2)), training=False).shape
    (4, 3, 2)

    Reference:
        [Huang et al., 2016](https://arxiv.org/abs/1603.09382), section 3.
    """

    def __init__(
        self, rate: float, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_rates(rate=rate)
        self.rate = rate
        self.seed = plain(seed)
        self.built = True
        self.seed_generator = SeedGenerator(self.seed)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        rate = self.rate if training else 0
        return drop(inputs, rate, self.seed_generator, shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable("keras_vmoe")
class LayerScale(keras.layers.Layer):
    """Multiplies each feature of a residual branch by a learned factor.

    Args:
        initial_value: Starting value of all factors, such as 1e-4.

    Call arguments:
        inputs: `(..., D)` float tensor.

    Returns:
        Tensor of the shape of `inputs`.

    Example:

    >>> LayerScale(1e-4)(keras.ops.ones((1, 2, 3))).shape
    (1, 2, 3)

    Reference:
        [Touvron et al., 2021](https://arxiv.org/abs/2103.17239), section 2.
    """

    def __init__(self, initial_value: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape: Shape) -> None:
        self.scale = self.add_weight(
            name="scale",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_value),
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        config = super().get_config()
        return {**config, "initial_value": self.initial_value}

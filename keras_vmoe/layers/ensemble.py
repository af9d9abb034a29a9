"""Members of an efficient ensemble: copies of images, and one answer."""

from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor


class _OfMembers(keras.layers.Layer):
    """Base of layers that know the number of members, M."""

    def __init__(self, ensemble_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_sizes(ensemble_size=ensemble_size)
        self.ensemble_size = int(ensemble_size)

    def get_config(self) -> Config:
        return {**super().get_config(), "ensemble_size": self.ensemble_size}


@keras.saving.register_keras_serializable("keras_vmoe")
class RepeatImages(_OfMembers):
    """Copies each image for the members of an ensemble.

    Args:
        ensemble_size: M.

    Call arguments:
        inputs: `(B, ...)` tensor.

    Returns:
        `(B * M, ...)` tensor, the copies of an image one after the other.

    Example:

    >>> RepeatImages(2)(keras.ops.ones((3, 5, 4))).shape
    (6, 5, 4)

    Reference:
        [Allingham et al., 2021](https://arxiv.org/abs/2110.03360), section 4.
    """

    def call(self, inputs: Tensor) -> Tensor:
        return ops.repeat(inputs, self.ensemble_size, axis=0)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, *others = input_shape
        batch = None if batch is None else batch * self.ensemble_size
        return (batch, *others)


@keras.saving.register_keras_serializable("keras_vmoe")
class JoinMembers(_OfMembers):
    """Gathers the outputs of an image's members along a new axis.

    Args:
        ensemble_size: M.

    Call arguments:
        inputs: `(B * M, D)` tensor, the members of an image one after the
            other.

    Returns:
        `(B, M, D)` tensor.

    Example:

    >>> JoinMembers(2)(keras.ops.ones((6, 4))).shape
    (3, 2, 4)
    """

    def call(self, inputs: Tensor) -> Tensor:
        batch = ops.shape(inputs)[0] // self.ensemble_size
        shape = (batch, self.ensemble_size, inputs.shape[-1])
        return ops.reshape(inputs, shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, features = input_shape
        batch = None if batch is None else batch // self.ensemble_size
        return (batch, self.ensemble_size, features)


@keras.saving.register_keras_serializable("keras_vmoe")
class MeanProbability(keras.layers.Layer):
    """The answer of an ensemble: the log of the members' mean probability.

    Call arguments:
        logits: `(B, M, classes)` float tensor.
        training: Training averages nothing: each member learns on its own.

    Returns:
        `(B, classes)` tensor, logits whose softmax is the mean probability; in
        training, `logits` unchanged.

    Example:

    >>> logits = keras.ops.convert_to_tensor([[[0.0, 0.0], [9.0, -9.0]]])
    >>> round(float(keras.ops.exp(MeanProbability()(logits))[0, 0]), 4)
    0.75

    Reference:
        [Allingham et al., 2021](https://arxiv.org/abs/2110.03360), section 2.
    """

    def call(self, logits: Tensor, training: bool = False) -> Tensor:
        return logits if training else mean_probability(logits)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], input_shape[-1])


def mean_probability(logits):
    """Maps `(B, M, classes)` logits to the log of the mean probability."""
    log = ops.log_softmax(logits, axis=-1)
    # The mean is already normalized, up to rounding. Normalizing again keeps
    # an image NaN on a runtime whose maximum ignores NaN.
    return ops.log_softmax(ops.logsumexp(log, axis=1), axis=-1)

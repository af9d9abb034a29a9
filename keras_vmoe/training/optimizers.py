"""Keras optimizers with weight decay by kind of variable; a schedule."""

import math
from collections.abc import Mapping
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_not_negative
from keras_vmoe._checks import is_number
from keras_vmoe._typing import Config
from keras_vmoe._typing import Tensor
from keras_vmoe.distribution import _replicas
from keras_vmoe.layers.weights import part_of

__all__ = ["SGD", "AdamW", "DecayByKind", "Lamb", "WarmUp"]


class DecayByKind:
    """Mixin that decays only kernels, with a separate rate for experts.

    Kernels are variables with that name, and all matrices of an expert bank.
    Layers declare which variables belong to gates, experts and learned
    positions, whatever their names.

    Decay is decoupled: each step a decayed variable loses the share
    `learning_rate * decay` of itself. Under LAMB, as in Keras, the trust ratio
    scales only the update, not the decay.

    Args:
        expert_weight_decay: Decay of the experts' kernels; None means
            `weight_decay`.
        decay_positions: Whether to decay learned positions as well.
        decay_gates: Whether to decay the gates' kernels as well.
    """

    def __init__(
        self,
        *args: Any,
        expert_weight_decay: float | None = None,
        decay_positions: bool = False,
        decay_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if expert_weight_decay is not None:
            check_not_negative(expert_weight_decay=expert_weight_decay)
        self.expert_weight_decay = expert_weight_decay
        self.decay_positions = decay_positions
        self.decay_gates = decay_gates

    def decay_of(self, variable: keras.Variable) -> float:
        """Returns the weight decay of a variable, according to its kind.

        Args:
            variable: A `keras.Variable`.

        Returns:
            A float, 0 for a variable that is not decayed.
        """
        part, decay = part_of(variable), self.weight_decay
        is_decayed = variable.name.endswith("kernel")
        if part == "expert":
            is_decayed = len(variable.shape) > 2  # (E, D, F); biases (E, F).
            if self.expert_weight_decay is not None:
                decay = self.expert_weight_decay
        elif part == "gate":
            is_decayed &= self.decay_gates
        elif part == "positions":
            is_decayed = self.decay_positions
        return float(decay or 0.0) if is_decayed else 0.0

    # Private in Keras, which has no public way to decay variables at several
    # rates: `exclude_from_weight_decay` is all or nothing, and on TensorFlow
    # `update_step` gets variables without a path.
    def _apply_weight_decay(self, variables):
        groups = {}
        for variable in variables:
            groups.setdefault(self.decay_of(variable), []).append(variable)
        groups.pop(0.0, None)
        weight_decay = self.weight_decay
        try:
            for self.weight_decay, group in groups.items():
                super()._apply_weight_decay(group)
        finally:
            self.weight_decay = weight_decay

    # Private in Keras, which has no public way to clip after gradients are
    # accumulated, or to clip the sum over tf.distribute's replicas: it clips
    # each replica's part separately.
    def _clip_gradients(self, grads):
        if not (self.clipnorm or self.global_clipnorm or self.clipvalue):
            return grads
        return _replicas.of_sum(super()._clip_gradients, grads)

    def get_config(self) -> Config:
        """Returns the arguments, for saving."""
        return {
            **super().get_config(),  # type: ignore[misc]  # Keras's.
            "expert_weight_decay": self.expert_weight_decay,
            "decay_positions": self.decay_positions,
            "decay_gates": self.decay_gates,
        }

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: Mapping[str, Any] | None = None
    ) -> Any:
        """Returns an optimizer of what `get_config` returned."""
        if "decayed" in config:  # Of version 0.1.0: patterns of paths.
            config = dict(config)
            patterns = " ".join(config.pop("decayed"))
            config["decay_positions"] = "positions" in patterns
        make = super().from_config  # type: ignore[misc]  # Keras's.
        return make(config, custom_objects=custom_objects)


@keras.saving.register_keras_serializable("keras_vmoe")
class AdamW(DecayByKind, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` with weight decay by kind of variable.

    Args:
        **kwargs: Those of `DecayByKind` and of `keras.optimizers.AdamW`.

    Example:

    >>> AdamW(1e-3, weight_decay=0.03, expert_weight_decay=0.06).decay_gates
    False

    Reference:
        [Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101).
    """


@keras.saving.register_keras_serializable("keras_vmoe")
class Lamb(DecayByKind, keras.optimizers.Lamb):
    """`keras.optimizers.Lamb` with weight decay by kind of variable.

    Args:
        **kwargs: Those of `DecayByKind` and of `keras.optimizers.Lamb`.

    Example:

    >>> Lamb(4e-3, weight_decay=0.03).decay_gates
    False

    Reference:
        [You et al., 2020](https://arxiv.org/abs/1904.00962), algorithm 2. In
        the paper the trust ratio scales the decay, too.
    """


@keras.saving.register_keras_serializable("keras_vmoe")
class SGD(DecayByKind, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with weight decay by kind of variable.

    Args:
        **kwargs: Those of `DecayByKind` and of `keras.optimizers.SGD`.

    Example:

    >>> SGD(0.01, momentum=0.9).momentum
    0.9
    """


OPTIMIZERS = {"adamw": AdamW, "lamb": Lamb, "sgd": SGD}
DECAYS = ("cosine", "linear", "rsqrt", "constant")


@keras.saving.register_keras_serializable("keras_vmoe")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then a decay.

    The first step uses `peak / warmup_steps`, step `warmup_steps` the peak.
    (`keras.optimizers.schedules.CosineDecay` would waste the first step on a
    learning rate of 0. Keras's other schedules have no warm-up.)

    Args:
        peak: Highest learning rate.
        steps: Steps of the whole run.
        warmup_steps: Steps of the warm-up, fewer than `steps`.
        decay: `"cosine"` or `"linear"` down to `end`, `"rsqrt"` (the peak times
            `sqrt(warmup_steps / step)`), or `"constant"`.
        end: Learning rate at the end of a cosine or linear decay.

    Raises:
        ValueError: If the decay is unknown, or a number is out of range.

    Example:

    >>> float(WarmUp(0.5, steps=100, warmup_steps=10)(9))
    0.5
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        warmup_steps: int = 0,
        decay: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine",
        end: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("decay", decay, DECAYS)
        if not is_number(peak) or peak <= 0 or not is_number(end) or end < 0:
            raise ValueError(
                "`peak` must be a number above 0 and `end` one of at least 0. "
                f"Received: peak={peak!r}, end={end!r}."
            )
        if not 0 <= warmup_steps < steps:
            raise ValueError(
                "The warm-up must end before the training. Received: "
                f"warmup_steps={warmup_steps}, steps={steps}. Shorten it or "
                "train longer."
            )
        self.peak = peak
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.end = end

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        start = float(max(1, self.warmup_steps))
        warm = self.peak * (step + 1.0) / start
        length = self.steps - self.warmup_steps
        done = ops.clip((step - self.warmup_steps) / length, 0.0, 1.0)
        if self.decay == "cosine":
            share = 0.5 * (1.0 + ops.cos(math.pi * done))
            rate = self.end + (self.peak - self.end) * share
        elif self.decay == "linear":
            rate = self.end + (self.peak - self.end) * (1.0 - done)
        elif self.decay == "rsqrt":
            rate = self.peak * ops.sqrt(start / ops.maximum(step, start))
        else:
            rate = self.peak
        return ops.where(step < self.warmup_steps, warm, rate)

    def get_config(self) -> Config:
        return {
            "peak": self.peak,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "decay": self.decay,
            "end": self.end,
        }

"""Linear probe: a new head on frozen features, trained on all labels."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._extras import require
from keras_vmoe._warnings import warn
from keras_vmoe.evaluation.features import checked

SOLVERS = ("sgd", "lbfgs")
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """The accuracy of a linear probe, and how its setting was chosen.

    Attributes:
        accuracy: Share of the test images that are classified correctly.
        solver: `"sgd"` or `"lbfgs"`.
        chosen: The learning rate or penalty whose held-out accuracy is best.
        held_out_accuracy: Dict from every value that was tried to the share of
            the held-out training images that are classified correctly.
        kernel: `(D, classes)` float32 array, for unstandardized features and
            the classes of the training labels in order.
        bias: `(classes,)` float32 array.
    """

    accuracy: float
    solver: str
    chosen: float
    held_out_accuracy: dict[float, float]
    kernel: np.ndarray
    bias: np.ndarray


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    solver: Literal["sgd", "lbfgs"] = "lbfgs",
    sweep: Sequence[float] | None = None,
    held_out: float = 0.1,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> LinearProbe:
    """Trains a new head on frozen features.

    The papers do not give their settings; these are ours. Features are
    standardized with the training images. One head is trained for each learning
    rate or penalty on part of the training images. The setting that is best on
    the rest is then used to train on all of them.

    Args:
        train: Pair `(features, labels)`, such as from `extract_features`.
        test: The same for the test images.
        solver: `"lbfgs"`: multinomial logistic regression in float64 with
            SciPy's L-BFGS; its loss is the mean cross-entropy plus half the
            penalty times the squared kernel. `"sgd"`: a `Dense` head trained by
            `fit`, momentum 0.9, cosine decay, for too many images for L-BFGS.
        sweep: Penalties (`"lbfgs"`) or learning rates (`"sgd"`) to choose from;
            None means 1e-6 to 0.1, or 0.003 to 1.
        held_out: Share of the training images held out to choose, in (0, 1).
        epochs: Passes of `"sgd"`, or maximum iterations of `"lbfgs"`.
        batch_size: Images per step of `"sgd"`.
        seed: Integer, seed of the held-out images and of the order.

    Returns:
        A `LinearProbe`.

    Raises:
        ValueError: If features are not finite, or settings are out of range.

    Example:

    >>> data = (np.eye(2).repeat(20, axis=0), np.arange(2).repeat(20))
    >>> linear_probe(data, data).accuracy
    1.0

    Reference:
        [Videau et al., 2024](https://arxiv.org/abs/2411.18322), table 2.
    """
    check_sizes(batch_size=batch_size)
    values = check_probe(solver, sweep, held_out, epochs)
    (x, y), (test_x, test_y), num_classes = checked(train, test)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    x = (x - mean) / std
    num_held = int(held_out * len(y))
    if not num_held:
        raise ValueError(
            "`held_out` must leave images on both sides. Received: held_out="
            f"{held_out} of {len(y)} images."
        )
    order = np.random.default_rng(seed).permutation(len(y))
    held, rest = order[:num_held], order[num_held:]

    def fit(part, value):
        if solver == "lbfgs":
            return _lbfgs(x[part], y[part], num_classes, value, epochs)
        sizes = (epochs, min(batch_size, len(part)))
        return _sgd(x[part], y[part], num_classes, value, *sizes, seed)

    found = {}
    for value in values:
        kernel, bias = fit(rest, value)
        found[value] = _accuracy(kernel, bias, x[held], y[held])
    chosen = max(found, key=lambda value: found[value])
    kernel, bias = fit(order, chosen)
    kernel = kernel / std[:, None]
    bias = bias - mean @ kernel
    return LinearProbe(
        accuracy=_accuracy(kernel, bias, test_x, test_y),
        solver=solver,
        chosen=chosen,
        held_out_accuracy=found,
        kernel=kernel.astype("float32"),
        bias=bias.astype("float32"),
    )


def check_probe(solver, sweep, held_out, epochs):
    """The values to choose from. Raises for settings out of range."""
    check_choice("solver", solver, SOLVERS)
    check_sizes(epochs=epochs)
    values = LEARNING_RATES if solver == "sgd" else PENALTIES
    values = tuple(values if sweep is None else sweep)
    if not 0 < held_out < 1:
        raise ValueError(
            "`held_out` must be a share between 0 and 1. Received: held_out="
            f"{held_out}."
        )
    if not values or not all(map(_is_positive, values)):
        raise ValueError(
            f"`sweep` must hold numbers above 0. Received: sweep={values}."
        )
    return values


def _is_positive(value):
    return is_number(value) and value > 0


def _accuracy(kernel, bias, x, y):
    return float(((x @ kernel + bias).argmax(axis=-1) == y).mean())


def _lbfgs(x, y, num_classes, penalty, iterations):
    """Kernel and bias of a multinomial logistic regression."""
    optimize = require("scipy.optimize", "data")
    targets = np.eye(num_classes)[y]
    shape = (x.shape[1] + 1, num_classes)

    def loss(flat):
        kernel, bias = np.split(flat.reshape(shape), [-1])
        logits = x @ kernel + bias
        logits -= logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        error = (np.exp(logits - log_sum) - targets) / len(x)
        value = (log_sum[:, 0] - logits[np.arange(len(y)), y]).mean()
        value += penalty / 2 * (kernel**2).sum()
        slopes = x.T @ error + penalty * kernel
        slopes = np.concatenate([slopes, error.sum(axis=0, keepdims=True)])
        return value, slopes.ravel()

    found = optimize.minimize(
        loss,
        np.zeros(np.prod(shape)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations},
    )
    if not found.success:
        warn(
            f"L-BFGS stopped after {found.nit} iterations at penalty {penalty} "
            "before it converged. Increase `epochs`."
        )
    kernel, bias = np.split(found.x.reshape(shape), [-1])
    return kernel, bias[0]


def _sgd(x, y, num_classes, learning_rate, epochs, batch_size, seed):
    """Kernel and bias of a head trained by `fit`, from 0."""
    head = keras.layers.Dense(
        num_classes, kernel_initializer="zeros", dtype="float32"
    )
    model = keras.Sequential([keras.Input(x.shape[1:]), head])
    batches = _Shuffled(x.astype("float32"), y, batch_size, seed)
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate, epochs * len(batches)
    )
    model.compile(
        keras.optimizers.SGD(schedule, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
    return [w.astype("float64") for w in head.get_weights()]


class _Shuffled(keras.utils.PyDataset):
    """Batches of arrays, reshuffled every epoch from a seed."""

    def __init__(self, x, y, batch_size, seed):
        super().__init__()
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self.y) // self.batch_size

    def __getitem__(self, index):
        start = index * self.batch_size
        part = self.order[start : start + self.batch_size]
        return self.x[part], self.y[part]

    def on_epoch_end(self):
        self.order = self.generator.permutation(len(self.y))

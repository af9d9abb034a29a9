"""What every layer and every model must do; each passes through here."""

import dataclasses
import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.base import Options
from tests.gradients import compiled
from tests.gradients import weight_gradients

# The softmax of attention does not feel what is added to all scores of a query.
WITHOUT_GRADIENT = ("attention/key/bias",)


def first_everywhere(values):
    """Parameters of a test: the first under every backend, then PyTorch alone.

    Of tests whose other cases differ in what no backend sees, or stand under
    every backend in another test.
    """
    once = pytest.mark.backends("torch")
    first, *others = values
    return [first, *(pytest.param(x, marks=once) for x in others)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer or model, how to make it and what to feed it.

    Attributes:
        layer: The class.
        arguments: Its constructor's arguments.
        input_shape: With the batch.
        output_shape: None if it is that of the inputs.
        without_gradient: Ends of the paths of weights whose gradient is 0 by
            nature.
        label: Name of the case; the class's name if empty.
    """

    layer: type
    arguments: dict
    input_shape: tuple
    output_shape: tuple | None = None
    without_gradient: tuple = WITHOUT_GRADIENT
    label: str = ""

    def make(self, **arguments):
        arguments = {**self.arguments, **arguments}
        # Parts would be shared: every layer gets copies of its own.
        for name, part in arguments.items():
            if isinstance(part, keras.layers.Layer):
                arguments[name] = type(part).from_config(part.get_config())
        return self.layer(**arguments)

    def inputs(self):
        generator = np.random.default_rng(0)
        return generator.normal(size=self.input_shape).astype("float32")

    def expected_shape(self):
        return self.output_shape or self.input_shape

    def __str__(self):
        return self.label or self.layer.__name__


def randomize(layer, seed=0):
    """Gives every weight random values, those that start at 0 too."""
    generator = np.random.default_rng(seed)
    for weight in layer.weights:
        values = generator.normal(size=weight.shape)
        weight.assign(0.3 * values.astype("float32"))
    return layer


def as_model(layer, input_shape):
    """A functional model around a layer, for any batch; a model as it is."""
    if isinstance(layer, keras.Model):
        return layer
    inputs = keras.Input(input_shape[1:])
    return keras.Model(inputs, layer(inputs))


def arguments_of(layer_class):
    """Names and defaults of a constructor's own arguments."""
    if "__init__" not in vars(layer_class):
        return {}
    parameters = dict(inspect.signature(layer_class.__init__).parameters)
    del parameters["self"]
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


def check_config(case):
    """The config names every argument, with its value, and makes a twin."""
    layer = case.make()
    config = layer.get_config()
    names = set(arguments_of(case.layer))
    if issubclass(case.layer, MoEModel):
        names |= set(Options.__annotations__)
    missing = names - set(config)
    assert not missing, f"get_config() lacks {missing}"
    for name, value in case.arguments.items():
        # What goes on to the default bank is an attribute of the bank.
        owner = layer if name in config else layer.experts
        assert hasattr(owner, name), f"{name} is not an attribute"
        if value is None or isinstance(value, bool | int | float | str):
            assert owner.get_config()[name] == value, name

    twin = case.layer.from_config(config)
    assert plain(twin.get_config()) == plain(config)
    serialized = keras.saving.serialize_keras_object(layer)
    restored = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(serialized))
    )
    assert plain(restored.get_config()) == plain(config)


def plain(config):
    """A config as JSON has it, without the shapes of built layers."""

    def strip(value):
        if isinstance(value, dict):
            return {
                k: strip(v) for k, v in value.items() if k != "build_config"
            }
        return value

    def write(value):
        if isinstance(value, keras.layers.Layer):
            return keras.saving.serialize_keras_object(value)
        return repr(value)

    return strip(json.loads(json.dumps(config, default=write)))


def check_outputs(case, folder):
    """Shapes, any batch, compiled as eager, and bit-equal after a reload.

    Whole models are compiled both times; the golden models run eagerly.
    """
    layer = case.make()
    config = plain(layer.get_config())
    model = randomize(as_model(layer, case.input_shape))
    assert plain(layer.get_config()) == config, "build changed the config"
    inputs, shape = case.inputs(), case.expected_shape()
    assert tuple(model.output_shape) == (None, *shape[1:])
    assert model.output.dtype == "float32"
    call = compiled if isinstance(layer, keras.Model) else lambda call: call
    eager = call(model)(inputs)
    assert tuple(eager.shape) == shape
    assert keras.backend.standardize_dtype(eager.dtype) == "float32"
    eager = ops.convert_to_numpy(eager)
    assert np.isfinite(eager).all()
    predicted = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(predicted, eager, rtol=1e-5, atol=1e-5)

    model.save(folder / "model.keras")
    loaded = keras.saving.load_model(folder / "model.keras")
    again = ops.convert_to_numpy(call(loaded)(inputs))
    np.testing.assert_array_equal(again, eager)


def check_all(case, folder):
    """Configuration, outputs, reload and gradients."""
    check_config(case)
    check_outputs(case, folder)
    check_gradients(case)


def check_gradients(case):
    """In training, every weight and every expert's part has a gradient."""
    layer, gradients = training_gradients(case, "float32")
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        if path.endswith(tuple(case.without_gradient)):
            continue
        assert gradient.any(), f"{path} has no gradient"
        if "experts/" in path:
            for e, part in enumerate(gradient):
                assert part.any(), f"expert {e} has no gradient in {path}"


def check_policy(case, policy):
    """Runs in training under a mixed policy, with float32 weights."""
    layer, gradients = training_gradients(case, policy)
    for weight in layer.weights:
        assert keras.backend.standardize_dtype(weight.dtype) == "float32"
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path


def training_gradients(case, policy):
    """A randomized layer and its weights' gradients in a training step."""
    layer = case.make(dtype=policy)
    inputs = ops.convert_to_tensor(case.inputs())
    if not layer.built:
        layer.build(case.input_shape)
    randomize(layer)
    is_model = isinstance(layer, keras.Model)
    output_dtype = "float32" if is_model else layer.compute_dtype
    generator = np.random.default_rng(1)
    probe = generator.normal(size=case.expected_shape())
    probe = ops.convert_to_tensor(probe, "float32")

    def loss():
        if accepts_training(layer):
            outputs = layer(inputs, training=True)
        else:
            outputs = layer(inputs)
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        assert dtype == output_dtype
        assert tuple(outputs.shape) == case.expected_shape()
        value = ops.sum(ops.cast(outputs, "float32") * probe)
        return value + sum(layer.losses)

    if not layer.trainable_weights:
        loss()
        return layer, {}
    return layer, weight_gradients(layer, loss)


def accepts_training(layer):
    return "training" in inspect.signature(layer.call).parameters

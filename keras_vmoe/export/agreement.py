"""One check for all formats: an export must reproduce the model's outputs.

The folder or file answers probes in a new process that has only its runtime
(`asking`); the model answers the same probes here, on its own backend.
"""

import os
import subprocess
import sys
import tempfile
import textwrap

import keras
import numpy as np
from keras import ops

from keras_vmoe._keras import all_layers
from keras_vmoe.data.images import decoded
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export import asking
from keras_vmoe.export.contents import noise
from keras_vmoe.export.settings import INPUT_NAMES
from keras_vmoe.export.variants import answering
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import routes_alone
from keras_vmoe.export.variants import with_quantized_experts

# Largest difference from the model's outputs, relative to their maximum.
TOLERANCES = {
    "CPU": 1e-5,
    "accelerator": 1e-3,  # Rounds more than the runtime's CPU.
    "16 bits": 2e-2,  # Every program rounds in its own order.
}
BATCH = 4  # Images of a probe.
ADVICE = (
    "Remove layers that, in evaluation, are random, keep a count or mix the "
    "images of a batch, and layers whose results under TensorFlow differ from "
    "those on their own backend."
)
LONGEST = 500  # Characters quoted of another library's error.


def agree(path, model, settings):
    """Raises unless an export reproduces the model's outputs.

    Rounding may send a token whose scores are nearly tied to another expert,
    but rarely in every image: half of the images must agree.

    Args:
        path: `pathlib.Path` of a version's folder, or of a file.
        model: A Keras model, on any backend.
        settings: `Settings` of the export.

    Returns:
        Dict from signature to the relative difference of its outputs.
    """
    if settings.quantize_experts is not None:
        model = with_quantized_experts(model, settings.quantize_experts)
    probes = make_probes(settings, model.input_shape[1:])
    answers = ask(path, settings.signatures, probes)
    known, differences = {}, {}
    for name, signature in settings.signatures.items():
        answer, mixed, *alone = answers[name]
        asked = (signature, settings, probes[name][0], known)
        right, tolerance, is_alone = _right(model, *asked)
        found = [_distances(name, answer, right, settings)]
        if is_alone:
            _check_alone(name, answer, mixed, tolerance)
            answer = {k: np.concatenate([x[k] for x in alone]) for k in answer}
            right = {k: x[: len(alone)] for k, x in right.items()}
            found.append(_distances(name, answer, right, settings))
        # The largest difference in the closer half.
        differences[name] = max(
            float(np.quantile(x, 0.5, method="lower")) for x in found
        )
        if not differences[name] <= tolerance:
            raise ValueError(
                "An export must reproduce the model's outputs. Received: "
                f"outputs of {name!r} that differ by {differences[name]:.1e}, "
                f"more than rounding explains ({tolerance:.0e}). {ADVICE}"
            )
    return differences


def make_probes(settings, shape):
    """Returns the probes of each signature.

    Args:
        settings: `Settings`.
        shape: `(H, W, C)`.

    Returns:
        Dict from signature to a list of batches: some images, the first of them
        with other batch mates, and the first two each alone.
    """
    batch = min(BATCH, settings.max_batch_size)
    probes = {}
    for name, signature in settings.signatures.items():
        kind, shape = signature.input, (batch, *shape[-3:])
        images, others = (noise(kind, shape, seed) for seed in (0, 1))
        mixed = np.concatenate([images[:1], others[1:]])
        probes[name] = [images, mixed, *np.split(images[:2], min(2, batch))]
    return probes


def ask(path, signatures, probes):
    """Returns the answers of an export, from a process with only its runtime.

    Args:
        path: `pathlib.Path` of a version's folder, or of a file.
        signatures: Dict from name to `Signature`.
        probes: Dict from signature to a list of batches.

    Returns:
        Dict from signature to a list of answers, which are dicts of arrays.
    """
    requests = {}
    for name, batches in probes.items():
        key = INPUT_NAMES[signatures[name].input]
        requests |= {f"{name}/{i}/{key}": x for i, x in enumerate(batches)}
    with tempfile.TemporaryDirectory() as folder:
        asked, said = f"{folder}/in.npz", f"{folder}/out.npz"
        np.savez(asked, **requests)
        _run_asking(path, asked, said)
        answers = {name: [{} for _ in x] for name, x in probes.items()}
        with np.load(said) as arrays:
            for key, value in arrays.items():
                name, i, output = key.split("/")
                answers[name][int(i)][output] = value
        return answers


def _run_asking(path, asked, said):
    """Runs `asking.main` in a separate process."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, asking.__file__, str(path), asked, said],
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",  # This process holds the GPUs.
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            "An export must load and answer in a process of its runtime. "
            f"Received: exit status {done.returncode} for {path.name!r} with: "
            f"{_last_error(done.stderr)} Try other routing or a model in "
            "float32; `export.saved_model` supports the most models."
        )


def _last_error(text):
    """Returns the error that ended a program, without its traceback."""
    lines = text.rpartition("Traceback (most recent call last):")[2]
    words = [x for x in lines.splitlines() if not x.startswith("  ")]
    return textwrap.shorten(" ".join(words), LONGEST)


def _right(model, signature, settings, content, known):
    """Returns outputs, tolerance, and whether images are routed alone."""
    images = _as_input(signature.input, content, settings, model)
    key = (*signature.routing.items(), images.tobytes())
    if key not in known:
        served = routed(model, signature.routing)
        asked = answering(served)
        with _full_precision():
            outputs = asked(images, training=False)
        known[key] = outputs, routes_alone(served)
    (outputs, is_alone), kind = known[key], "accelerator"
    if {x.compute_dtype for x in all_layers(model)} & {"float16", "bfloat16"}:
        kind = "16 bits"
    elif all("cpu" in str(x.device).lower() for x in outputs.values()):
        kind = "CPU"
    right = {k: ops.convert_to_numpy(x) for k, x in outputs.items()}
    return right, TOLERANCES[kind], is_alone


def _as_input(kind, content, settings, model):
    """Returns the model's input for the content of a request."""
    preprocessing = settings.preprocessing
    if kind == "float":
        return content
    if kind == "encoded":
        size = model.input_shape[1:3]
        content = [decoded(x, size, preprocessing) for x in content]
    return preprocessing.normalized(np.asarray(content, "float32"))


def _full_precision():
    """Disables the low-precision float32 products of accelerators."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_matmul_precision("float32")
    if keras.backend.backend() == "torch":
        import torch

        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return import_tensorflow().device("CPU")


def _check_alone(name, answer, mixed, tolerance):
    """Raises if the first image's answer depends on the other images."""
    change = max(_distance(mixed[k], x)[0] for k, x in answer.items())
    if not change <= tolerance:
        raise ValueError(
            "An image's outputs must not depend on its batch mates. Received: "
            f"outputs of {name!r} that change by {change:.1e} with other batch "
            f"mates. {ADVICE}"
        )


def _distances(name, answer, right, settings):
    """Returns `(B,)`, the distance of each answer from the right one."""
    numbers = [x for x in answer.values() if x.dtype.kind == "f"]
    if not all(np.isfinite(x).all() for x in numbers):
        raise ValueError(
            "Noise images must have finite outputs. Received: NaN or infinity "
            f"from {name!r}. Look for NaN in the weights, a `std` close to 0, "
            "or a `max_pixels` below the size of the model's images."
        )
    if "logits" in answer:
        right = {**right, **_derived(answer["logits"], settings)}
    return np.max([_distance(x, right[k]) for k, x in answer.items()], axis=0)


def _derived(logits, settings):
    """Returns the probabilities, classes and class names of logits."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    best = logits.argmax(axis=-1)
    derived = {
        "probabilities": powers / powers.sum(axis=-1, keepdims=True),
        "class_id": best,
    }
    if settings.class_names is not None:
        names = np.array(settings.class_names)[best]
        derived["class_name"] = np.char.encode(names, "utf-8")
    return derived


def _distance(given, right):
    """Returns `(B,)`, the largest difference in each image's outputs."""
    if given.shape != right.shape:
        raise ValueError(
            "Outputs must have the shapes of the model's. Received: shape "
            f"{given.shape} instead of {right.shape}. {ADVICE}"
        )
    if given.dtype.kind != "f":
        return np.where(given == right, 0.0, np.inf)
    scale = max(1, np.abs(right).max())
    return np.abs(given - right).max(axis=-1) / scale

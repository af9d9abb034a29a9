"""`export`: a model for servers or devices."""

import json
import pathlib
from types import SimpleNamespace
from typing import Literal

from keras_vmoe import export
from keras_vmoe._extras import require
from keras_vmoe.cli.opening import numbers
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import setting_of_run
from keras_vmoe.data.preprocessing import MAX_PIXELS
from keras_vmoe.export.settings import MAX_BATCH_SIZE

# Settings of a run.
TEST_CROP, OF_CARD = "data.test_crop", ("model.preset", "data.dataset")
EXAMPLE = "fast:capacity_factor=0.5,batch_priority=true"


def export_model(
    model: str,
    output: str,
    *,
    format: Literal["saved_model", "onnx", "litert"] = "saved_model",
    images_per_group: int | Literal["batch"] = 1,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    quantize_experts: Literal["int8", "float16"] | None = None,
    version: int = 1,
    signatures: list[str] = (),
    max_batch_size: int = MAX_BATCH_SIZE,
    mean: float | list[float] = 127.5,
    std: float | list[float] = 127.5,
    test_crop: float | None = None,
    max_pixels: int = MAX_PIXELS,
    warmup: bool | list[int] = True,
    classes: str | None = None,
):
    """Write a model for servers or devices.

    A SavedModel for TF Serving into the folder OUTPUT/VERSION, or an ONNX or
    LiteRT file. A signature is NAME:SETTING=VALUE,SETTING=VALUE with the
    settings input (float, uint8 or encoded), features, capacity_factor,
    num_selected_experts, batch_priority and images_per_group, or NAME: alone.

    Args:
        model: Run folder or .keras file.
        output: Folder of the versions, or the file to write.
        format: What to write.
        images_per_group: Images routed together; 1: independently.
        capacity_factor: Capacity of the experts; null: the model's.
        num_selected_experts: K of an ONNX or LiteRT file.
        batch_priority: Confident tokens first, in such a file.
        quantize_experts: How the experts' kernels are stored.
        version: Version of a SavedModel.
        signatures: Further settings of the routing, see below.
        max_batch_size: Larger requests are refused.
        mean: Mean subtracted from pixels in [0, 255].
        std: Standard deviation that pixels are divided by.
        test_crop: Share of the shorter side kept; null: the run's.
        max_pixels: Files of more pixels are not decoded.
        warmup: Write warm-up requests, or their batch sizes.
        classes: JSON list of class names; null: the run folder's.

    Example:
        keras-vmoe export runs/digits served/digits
        keras-vmoe export runs/digits served/digits --version 2 --signatures \\
          fast:capacity_factor=0.5 accurate:num_selected_experts=3,input=encoded
        keras-vmoe export model.keras served/mine --test_crop 0.875 \\
          --mean='[123.675,116.28,103.53]' --std='[58.395,57.12,57.375]'
        keras-vmoe export runs/digits digits.onnx --format onnx \\
          --capacity_factor 0.5 --batch_priority true
    """
    _export(SimpleNamespace(**locals()))


def _export(given):
    """Writes what the command was asked for."""
    common = {
        "images_per_group": given.images_per_group,
        "capacity_factor": given.capacity_factor,
        "quantize_experts": given.quantize_experts,
    }
    dials = {
        "num_selected_experts": given.num_selected_experts,
        "batch_priority": given.batch_priority,
    }
    serving = {
        "version": given.version,
        "signatures": [_signature(text) for text in given.signatures],
        "max_batch_size": given.max_batch_size,
        "warmup": given.warmup,
    }
    pixels = {
        "mean": given.mean,
        "std": given.std,
        "test_crop": given.test_crop,
        "max_pixels": given.max_pixels,
    }
    model, names = open_model(given.model, given.classes)
    if given.format != "saved_model":
        unused = {**serving, **pixels, "classes": given.classes}
        _check_unused(unused, given.format)
        write = getattr(export, given.format)
        print(f"model: {write(model, given.output, **common, **dials)}")
        return
    _check_dials(dials)
    _check_folder(given.output)
    crop = setting_of_run(given.model, TEST_CROP)
    tested = export.Preprocessing(test_crop=crop)
    if given.test_crop is None:
        pixels["test_crop"] = crop
    preprocessing = export.Preprocessing(**pixels)
    unnamed = names == numbers(model.output_shape[-1])
    path = export.saved_model(
        model,
        given.output,
        preprocessing=preprocessing,
        class_names=None if unnamed else names,
        card=_card(given.model, preprocessing, tested),
        **serving,
        **common,
    )
    print(f"model: {path}")


def _check_folder(output):
    """Raises if this is the name of a file of another format."""
    formats = {".onnx": "onnx", ".tflite": "litert"}
    suffix = pathlib.Path(output).suffix
    if suffix in formats:
        raise ValueError(
            "A SavedModel is a folder of versions. Received: "
            f"{output}. Write --format {formats[suffix]}, or another name."
        )


def _check_unused(given, format):
    """Raises if something is set that an ONNX or LiteRT file has not."""
    defaults = export_model.__kwdefaults__
    for name, value in given.items():
        if value != defaults[name] and value != []:
            raise ValueError(
                f"Only a SavedModel has {name}. Received: --{name} {value} "
                f"with --format {format}. Leave it out."
            )


def _check_dials(dials):
    """Raises if something is set that the signatures of a SavedModel set."""
    for name, value in dials.items():
        if value is not None:
            raise ValueError(
                f"A SavedModel has {name} for each signature. Received: "
                f"--{name} {value} with --format saved_model. Write for "
                f"example --signatures mine:{name}={str(value).lower()}."
            )


def _signature(text):
    """`fast:capacity_factor=0.5,batch_priority=true` as name and settings."""
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if rest]
    keys = [key for key, _, _ in pairs]
    whole = all(key and value for key, _, value in pairs)
    if not colon or not whole or len({*keys}) < len(keys):
        raise ValueError(
            "A signature is written as NAME:SETTING=VALUE,SETTING=VALUE, each "
            "setting once. "
            f"Received: --signatures {text}. Write for example {EXAMPLE}."
        )
    yaml = require("yaml", "cli")
    try:
        return name, {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ValueError(
            "The values of a signature must be numbers, words, true or false. "
            f"Received: --signatures {text}. Write for example {EXAMPLE}."
        ) from error


def _card(model, preprocessing, tested):
    """What a run folder knows for the model card.

    Args:
        model: Run folder or `.keras` file.
        preprocessing: `Preprocessing` of the export.
        tested: That of the run's test.
    """
    path = pathlib.Path(model)
    path = (path if path.is_dir() else path.parent) / "result.json"
    card = {}
    pixels = ("mean", "std", "test_crop")
    alike = all(getattr(preprocessing, x) == getattr(tested, x) for x in pixels)
    if path.exists() and alike:
        accuracy = json.loads(path.read_text()).get("accuracy")
        card["test_accuracy"] = accuracy
        card["test_accuracy_of"] = (
            "the run, under the routing of training, its experts not quantized"
        )
    for name in OF_CARD:
        value = setting_of_run(model, name)
        if value is not None:
            card[name.rpartition(".")[2]] = value
    return card

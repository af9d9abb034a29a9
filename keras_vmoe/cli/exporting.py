"""`export`: a model for servers or devices."""

import json
import pathlib
from collections.abc import Sequence
from typing import Literal

from keras_vmoe import export
from keras_vmoe._extras import require
from keras_vmoe.cli.opening import numbers
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import run_dir_of
from keras_vmoe.cli.opening import setting_of_run
from keras_vmoe.data import Preprocessing
from keras_vmoe.data.untrusted import MAX_PIXELS
from keras_vmoe.export.settings import MAX_BATCH_SIZE

# Settings of a run.
OF_CARD = ("model.preset", "data.dataset")
# Settings of all formats, of files only, and of a SavedModel only.
COMMON = ("images_per_group", "capacity_factor", "quantize_experts")
DIALS = ("num_selected_experts", "batch_priority")
SERVING = ("version", "signatures", "max_batch_size", "max_pixels", "warmup")
PIXELS = ("mean", "std", "test_crop")
FORMATS = {".onnx": "onnx", ".tflite": "litert"}
EXAMPLE = "fast:capacity_factor=0.5,batch_priority=true"


def export_model(
    model: str,
    output: str,
    *,
    format: Literal["saved_model", "onnx", "litert"] | None = None,
    images_per_group: int | Literal["batch"] = 1,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    quantize_experts: Literal["int8", "float16"] | None = None,
    version: int = 1,
    signatures: Sequence[str] = (),
    max_batch_size: int = MAX_BATCH_SIZE,
    mean: float | list[float] | None = None,
    std: float | list[float] | None = None,
    test_crop: float | None = None,
    max_pixels: int = MAX_PIXELS,
    warmup: bool | list[int] = True,
    classes: str | None = None,
) -> None:
    """Export a model for servers or devices.

    Writes a SavedModel for TF Serving to the folder OUTPUT/VERSION, or an ONNX
    or LiteRT file. A signature is NAME:SETTING=VALUE,SETTING=VALUE with the
    settings input (float, uint8 or encoded), features, capacity_factor,
    num_selected_experts, batch_priority and images_per_group, or NAME: alone.

    Args:
        model: Run folder or .keras file.
        output: Folder of versions, or file.
        format: What to write; default: by OUTPUT's name.
        images_per_group: Images routed together.
        capacity_factor: Experts'; default: the model's.
        num_selected_experts: K of an ONNX or LiteRT file.
        batch_priority: Batch priority of such a file.
        quantize_experts: Store the experts' kernels as this.
        version: Version of a SavedModel.
        signatures: More routing settings, see above.
        max_batch_size: Refuse larger requests.
        mean: Subtracted from pixels in [0, 255]; default: the model's.
        std: Divides the difference; default: the model's.
        test_crop: Share of the side kept; default: the model's.
        max_pixels: Refuse larger image files.
        warmup: Batch sizes of warm-up requests, or false.
        classes: JSON list of names; default: the run's.

    Example:
        keras-vmoe export runs/digits served/digits
        keras-vmoe export runs/digits served/digits --version 2 --signatures \\
          fast:capacity_factor=0.5 accurate:num_selected_experts=3,input=encoded
        keras-vmoe export model.keras served/mine --test_crop 0.875 \\
          --mean='[123.675,116.28,103.53]' --std='[58.395,57.12,57.375]'
        keras-vmoe export runs/digits digits.onnx \\
          --capacity_factor 0.5 --batch_priority true
    """
    given = {**locals(), "signatures": [_signature(x) for x in signatures]}
    common = {name: given[name] for name in COMMON}
    dials = {name: given[name] for name in DIALS}
    serving = {name: given[name] for name in SERVING}
    pixels = {name: given[name] for name in PIXELS}
    opened, names = open_model(model, classes)
    format = format or _format_of(output)
    if format != "saved_model":
        _check_unused(format, **serving, **pixels, classes=classes)
        write = getattr(export, format)
        print(f"model: {write(opened, output, **common, **dials)}")
        return
    _check_served(output, dials)
    tested = opened.preprocessing
    preprocessing = Preprocessing.of(tested, **pixels)
    unnamed = names == numbers(opened.output_shape[-1])
    path = export.saved_model(
        opened,
        output,
        preprocessing=preprocessing,
        class_names=None if unnamed else names,
        card=_card(model, preprocessing, tested),
        **serving,
        **common,
    )
    print(f"model: {path}")


def _format_of(output):
    """The format by an output's name; a folder's may end like a version."""
    suffix = pathlib.Path(output).suffix
    if suffix in FORMATS or not suffix or suffix[1:].isdigit():
        return FORMATS.get(suffix, "saved_model")
    raise ValueError(
        "The name of a file to export must end in .onnx or .tflite, and that "
        f"of a SavedModel's folder in none. Received: {output}. Name it so, or "
        "set --format."
    )


def _check_unused(format, **given):
    """Raises if a setting does not apply to ONNX or LiteRT files."""
    defaults = export_model.__kwdefaults__
    for name, value in given.items():
        if value != defaults[name] and value != []:
            raise ValueError(
                f"Only a SavedModel has {name}. Received: --{name} {value} "
                f"for a file of format {format}. Omit it."
            )


def _check_served(output, dials):
    """Raises for the name or the settings of a file of another format."""
    if pathlib.Path(output).suffix in FORMATS:
        raise ValueError(
            "A SavedModel is a folder of versions. Received: "
            f"{output} with --format saved_model. Choose another name."
        )
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
    """Entries for the model card from a model's run folder.

    The run was `tested` with this `Preprocessing`.
    """
    card, result = {}, run_dir_of(model) / "result.json"
    if result.exists() and preprocessing == tested:
        card["test_accuracy"] = json.loads(result.read_text()).get("accuracy")
        card["test_accuracy_of"] = (
            "the run, under the routing of training, its experts not quantized"
        )
    for name in OF_CARD:
        value = setting_of_run(model, name)
        if value is not None:
            card[name.rpartition(".")[2]] = value
    return card

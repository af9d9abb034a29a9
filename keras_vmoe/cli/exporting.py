"""`export` and `serve-check`."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace
from typing import Literal

from keras_vmoe import export
from keras_vmoe._extras import require
from keras_vmoe.cli.opening import numbers
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import setting_of_run
from keras_vmoe.export.saved_model import MAX_BATCH_SIZE
from keras_vmoe.export.settings import MAX_PIXELS


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
          fast:capacity_factor=0.5,batch_priority=true \\
          accurate:num_selected_experts=3,input=encoded
        keras-vmoe export model.keras served/mine --test_crop 0.875 \\
          --mean='[123.675,116.28,103.53]' --std='[58.395,57.12,57.375]'
        keras-vmoe export runs/digits digits.onnx --format onnx \\
          --capacity_factor 0.5 --batch_priority true
    """
    # merge: the body of the export room's own.
    settings = SimpleNamespace(**locals())
    settings.signatures = list(signatures)
    model, names = open_model(settings.model, classes)
    common = {
        "images_per_group": settings.images_per_group,
        "capacity_factor": settings.capacity_factor,
        "quantize_experts": settings.quantize_experts,
    }
    dials = {
        "num_selected_experts": settings.num_selected_experts,
        "batch_priority": settings.batch_priority,
    }
    table = [_signature(text) for text in settings.signatures]
    if settings.format != "saved_model":
        _check_unused(settings)
        write = getattr(export, settings.format)
        path = write(model, settings.output, **common, **dials)
        print(f"model: {path}")
        return
    _check_dials(dials)
    _check_folder(settings.output)
    classes = model.output_shape[-1]
    path = export.saved_model(
        model,
        settings.output,
        settings.version,
        table,
        warmup=settings.warmup,
        max_batch_size=settings.max_batch_size,
        preprocessing=_preprocessing(settings),
        class_names=None if names == numbers(classes) else names,
        card=_card(settings),
        **common,
    )
    print(f"model: {path}")
    print(f"try it: keras-vmoe serve-check {path} --model {settings.model}")


def _preprocessing(settings):
    """What is set, and the crop of the run where none is."""
    crop = settings.test_crop
    if crop is None:
        crop = setting_of_run(settings.model, "data.test_crop")
    mean, std = (
        tuple(x) if isinstance(x, list) else x
        for x in (settings.mean, settings.std)
    )
    return export.Preprocessing(mean, std, crop, settings.max_pixels)


def _is_preprocessed_otherwise(settings):
    """Whether images are not what they were where the run was tested."""
    crop = setting_of_run(settings.model, "data.test_crop")
    tested = export.Preprocessing(test_crop=crop)
    given = dataclasses.replace(
        _preprocessing(settings), max_pixels=tested.max_pixels
    )
    return given != tested


def _check_folder(output):
    """Raises if this is the name of a file of another format."""
    formats = {".onnx": "onnx", ".tflite": "litert"}
    suffix = pathlib.Path(output).suffix
    if suffix in formats:
        raise ValueError(
            "A SavedModel is a folder of versions. Received: "
            f"{output}. Write --format {formats[suffix]}, or another name."
        )


def _check_unused(settings):
    """Raises if something is set that an ONNX or LiteRT file has not."""
    for name, default in (
        ("signatures", []),
        ("version", 1),
        ("warmup", True),
        ("max_batch_size", MAX_BATCH_SIZE),
        ("classes", None),
        ("mean", 127.5),
        ("std", 127.5),
        ("test_crop", None),
        ("max_pixels", MAX_PIXELS),
    ):
        if getattr(settings, name) != default:
            raise ValueError(
                f"Only a SavedModel has {name}. Received: --{name} "
                f"{getattr(settings, name)} with --format {settings.format}. "
                "Leave it out."
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


def serve_check(directory: str, *, model: str | None = None, rounds: int = 20):
    """Try an exported model: replay its warm-up requests, without Keras.

    Args:
        directory: Folder of versions, or one version.
        model: Run folder or .keras file to compare the answers with.
        rounds: Answers for each time.

    Example:
        keras-vmoe serve-check served/digits
        keras-vmoe serve-check served/digits --model runs/digits
    """
    if model is not None:
        model, _ = open_model(model)
    checked = export.check(directory, model, rounds)
    print(export.report(checked))
    if not checked.agrees:
        wrong = {
            x["signature"]
            for x in checked.requests
            if not x["difference"] <= checked.tolerance
        }
        raise ValueError(
            "The answers must be those of the model, but for "
            f"{checked.tolerance:.0e} of the largest number. Received: the "
            f"differences above, too large for {', '.join(sorted(wrong))}. "
            "Give the model that was exported."
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
            f"Received: --signatures {text}. Write for example "
            "fast:capacity_factor=0.5,batch_priority=true."
        )
    yaml = require("yaml", "cli")
    try:
        return name, {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ValueError(
            "The values of a signature must be numbers, words, true or false. "
            f"Received: --signatures {text}. Write for example "
            "fast:capacity_factor=0.5,batch_priority=true."
        ) from error


def _card(settings):
    """What a run folder knows for the model card."""
    model, path = settings.model, pathlib.Path(settings.model)
    path = (path if path.is_dir() else path.parent) / "result.json"
    card = {}
    if path.exists() and not _is_preprocessed_otherwise(settings):
        accuracy = json.loads(path.read_text()).get("accuracy")
        card["test_accuracy"] = accuracy
        card["test_accuracy_of"] = (
            "the run, under the routing of training, its experts not quantized"
        )
    for name in ("model.preset", "data.dataset"):
        value = setting_of_run(model, name)
        if value is not None:
            card[name.partition(".")[2]] = value
    return card

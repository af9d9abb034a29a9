"""`check`: an exported folder as a server would have it."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import keras
import numpy as np
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe.export import replay
from keras_vmoe.export.arguments import CARD_NAMES
from keras_vmoe.export.arguments import check_path
from keras_vmoe.export.card import CARD
from keras_vmoe.export.card import LABELS
from keras_vmoe.export.endpoints import decoded
from keras_vmoe.export.endpoints import normalized
from keras_vmoe.export.errors import shortened
from keras_vmoe.export.settings import DIALS
from keras_vmoe.export.settings import Preprocessing
from keras_vmoe.export.variants import answering
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_small_experts

# Of an answer, where the largest number is 1; and where layers compute in
# 16 bits, which every program rounds in its own order.
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2


@dataclasses.dataclass(frozen=True)
class Check:
    """What came of replaying an export's warm-up requests.

    Attributes:
        folder: `pathlib.Path` of the version.
        weight_bytes: Size of its weights.
        disk_bytes: Size of the whole folder.
        load_bytes: Memory that loading it took at its peak.
        load_seconds: Time that loading it took.
        requests: One dict for each request: `signature`, `batch`, `ms` (lower
            quartile, median, upper quartile of the time of an answer),
            `graph_bytes` of its signature, and `difference`, the largest of its
            answers to those of the model, relative to the largest number of
            these; None where there was no model.
        tolerance: The largest difference of an answer that agrees.

    Example: see `check`.
    """

    folder: pathlib.Path
    weight_bytes: int
    disk_bytes: int
    load_bytes: int
    load_seconds: float
    requests: list
    tolerance: float

    @property
    def agrees(self):
        """Whether no answer differs from that of the model."""
        found = [x["difference"] for x in self.requests]
        return all(x is None or x <= self.tolerance for x in found)


def check(directory, model=None, rounds=20):
    """Replays an export's warm-up requests in a process without Keras.

    That process loads the folder by TensorFlow's C API, as TF Serving does.

    Args:
        directory: Folder of a version, or of versions: then the newest.
        model: The Keras model that was exported, on any backend, to compare
            with, after its experts are quantized as those of the export; None
            compares nothing.
        rounds: How often each request is answered for its time.

    Returns:
        A `Check`.

    Raises:
        FileNotFoundError: If there is no SavedModel.
        ValueError: If the folder has no warm-up requests, or cannot be loaded,
            or if the model is none or one of other outputs.

    Example:

    >>> from keras_vmoe.export import saved_model
    >>> from keras_vmoe.models import ViTMoE
    >>> model = ViTMoE(
    ...     image_size=16, patch_size=4, hidden_dim=16, num_layers=2,
    ...     num_heads=2, mlp_dim=32, num_classes=10,
    ...     moe={"layers": [1], "num_experts": 4})
    >>> path = saved_model(model, "served")
    >>> checked = check("served", model)
    >>> checked.agrees
    True
    >>> "serve_jpeg" in report(checked)
    True
    """
    check_path("directory", directory)
    check_sizes(rounds=rounds)
    _check_is_model(model)
    folder = replay.newest_version(directory)
    facts, answers = _replayed(folder, rounds)
    differences = _differences(folder, model, answers)
    return Check(
        folder=folder,
        weight_bytes=_size(folder / "variables"),
        disk_bytes=_size(folder),
        load_bytes=facts["load_bytes"],
        load_seconds=facts["load_seconds"],
        requests=[
            {
                **x,
                "graph_bytes": facts["graph_bytes"][x["signature"]],
                "difference": found,
            }
            for x, found in zip(facts["requests"], differences, strict=True)
        ],
        tolerance=TOLERANCE if model is None else tolerance_of(model),
    )


def _check_is_model(model):
    if model is not None and not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be the Keras model that was exported, or None. "
            f"Received: model={model!r}. Load it by `models.load`."
        )


def tolerance_of(model):
    """How far answers may be from a model's, where the largest is 1."""
    dtypes = {x.compute_dtype for x in model._flatten_layers()}
    halves = dtypes & {"float16", "bfloat16"}
    return HALF_TOLERANCE if halves else TOLERANCE


def _replayed(folder, rounds):
    """What a process without Keras tells of a folder, and its answers."""
    with tempfile.TemporaryDirectory() as temporary:
        answers = pathlib.Path(temporary, "answers.npz")
        command = [sys.executable, replay.__file__, str(folder)]
        command += ["--rounds", str(rounds), "--save", str(answers)]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True
        )
        if done.returncode:
            reason = shortened(_last_error(done.stderr))
            raise ValueError(
                "TensorFlow must be able to load the folder and to answer its "
                f"warm-up requests. Received: {folder}, and exit status "
                f"{done.returncode} with: {reason} Export it again."
            )
        facts = json.loads(done.stdout.splitlines()[-1])
        if not facts["requests"]:
            raise ValueError(
                "There must be warm-up requests to replay. Received: "
                f"{folder} without any. Export it with `warmup=True`."
            )
        with np.load(answers) as stored:
            return facts, dict(stored)


def _last_error(text):
    """The words of the error that ended a program; all where there is none."""
    *_, words = re.split(r"^(?:\w+\.)*\w*(?:Error|Request): ", text, flags=re.M)
    return words.strip()


def _size(folder):
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())


def _differences(folder, model, given):
    """How far each answer is from the model's; None without a model."""
    requests = replay.read_requests(folder)
    if model is None:
        return [None] * len(requests)
    card = _card(folder)
    if card["quantize_experts"] is not None:
        model = with_small_experts(model, card["quantize_experts"])
    differences = []
    for i, (name, inputs) in enumerate(requests):
        signature = card["signatures"][name]
        dials = {k: signature[k] for k in DIALS if signature[k] is not None}
        images = _images(signature["input"], inputs, card)
        try:
            right = answering(routed(model, dials))(images, training=False)
        except ValueError as error:
            raise ValueError(
                "The model must be the one that was exported. Received: one "
                f"that cannot do what the signature {name!r} does. ({error})"
            ) from error
        right = {k: ops.convert_to_numpy(x) for k, x in right.items()}
        answer = {k: x for k, x in given.items() if k.startswith(f"{i}/")}
        answer = {k.partition("/")[2]: x for k, x in answer.items()}
        if "class_name" in answer:
            right["class_name"] = _names(
                folder, card["num_classes"], answer["class_id"]
            )
        differences.append(difference(answer, right))
    return differences


def _card(folder):
    """The model card of a folder."""
    path = folder / CARD
    if not path.exists():
        raise FileNotFoundError(
            "To compare with a model, an export must have its model card. "
            f"Received: {str(folder)!r} without {CARD}. Leave the model out."
        )
    try:
        card = json.loads(path.read_text("utf-8"))
        missing = {*CARD_NAMES} - card.keys()
    except (ValueError, AttributeError) as error:
        missing = error
    if missing:
        raise ValueError(
            "To compare with a model, a model card must be whole. Received: "
            f"{str(path)!r} ({missing}). Export it again, or leave the model "
            "out."
        )
    return card


def _names(folder, num_classes, classes):
    """The names of classes, those of images without one included."""
    path = folder / LABELS
    names = path.read_text("utf-8").splitlines() if path.exists() else []
    if len(names) != num_classes:
        raise ValueError(
            f"There must be a name for each of the {num_classes} classes. "
            f"Received: {str(path)!r} with {len(names)}. Export it again, or "
            "leave the model out."
        )
    return np.array([*names, ""])[classes].astype(bytes)


def difference(answer, right):
    """The largest difference, where the largest right number is 1.

    An answer whose classes are not those of its own logits is infinitely far.

    Args:
        answer: Dict of arrays, the answer of a signature.
        right: Dict of arrays, what the model says.
    """
    names = answer.keys() & right.keys()
    for name in names:
        if answer[name].shape != right[name].shape:
            raise ValueError(
                "The answers must have the shapes of the model's outputs. "
                f"Received: {name} of shape {answer[name].shape} for "
                f"{right[name].shape}. Give the model that was exported."
            )
    if "logits" in names:
        best = answer["logits"].argmax(axis=-1)
        if not np.array_equal(answer["class_id"], best):
            return float("inf")
        right = {**right, "probabilities": _softmax(right["logits"])}
        names |= {"probabilities"}
    return max(distance(answer[name], right[name]) for name in names)


def distance(answer, right):
    """How far an array is from the right one, where its largest is 1."""
    if answer.dtype.kind in "OS":  # Names of classes.
        return 0.0 if np.array_equal(answer, right) else float("inf")
    scale = max(1, np.abs(right).max())
    return float(np.abs(answer - right).max() / scale)


def _softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _images(kind, inputs, card):
    """The model's input for what a request holds."""
    (content,) = inputs.values()
    if kind == "float":
        return content
    preprocessing = Preprocessing(**card["preprocessing"])
    if kind == "encoded":
        crop = preprocessing.test_crop
        shape = (*card["image_size"], card["channels"])
        content = [decoded(x, shape, crop) for x in content]
    return normalized(np.asarray(content, "float32"), preprocessing)


def report(checked):
    """A `Check` as text.

    Args:
        checked: A `Check`.

    Returns:
        String of several lines: sizes and the time of loading, then a row for
        each request with its times in ms and its difference to the model.

    Example: see `check`.
    """
    lines = [
        f"{checked.folder}: {checked.disk_bytes / 1e6:.2f} MB, of which "
        f"weights {checked.weight_bytes / 1e6:.2f} MB; loaded in "
        f"{checked.load_seconds:.1f} s with {checked.load_bytes / 1e6:.0f} MB",
        "",
        f"{'signature':<16} {'batch':>5} {'ms':>8} {'quartiles':>17} "
        f"{'graph, MB':>9}  difference",
    ]
    for x in checked.requests:
        low, middle, high = x["ms"]
        difference = x["difference"]
        shown = "" if difference is None else f"{difference:.1e}"
        lines.append(
            f"{x['signature']:<16} {x['batch']:>5} {middle:>8.2f} "
            f"{low:>8.2f} {high:>8.2f} {x['graph_bytes'] / 1e6:>9.2f}  {shown}"
        )
    return "\n".join(lines)

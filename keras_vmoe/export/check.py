"""`check`: an exported folder as a server would have it."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from keras import ops

from keras_vmoe.export import replay
from keras_vmoe.export.card import CARD
from keras_vmoe.export.endpoints import decoded
from keras_vmoe.export.settings import DIALS
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_small_experts

TOLERANCE = 1e-5  # Of an answer, where the largest number is 1.


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
    """

    folder: pathlib.Path
    weight_bytes: int
    disk_bytes: int
    load_bytes: int
    load_seconds: float
    requests: list

    @property
    def agrees(self):
        """Whether no answer differs from that of the model."""
        found = [x["difference"] for x in self.requests]
        return all(x is None or x <= TOLERANCE for x in found)


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
        ValueError: If the folder has no warm-up requests, or cannot be loaded.

    Example:

    >>> check("served", model).agrees  # doctest: +SKIP
    True
    """
    folder = replay.newest_version(directory)
    with tempfile.TemporaryDirectory() as temporary:
        answers = pathlib.Path(temporary, "answers.npz")
        command = [sys.executable, replay.__file__, str(folder)]
        command += ["--rounds", str(rounds), "--save", str(answers)]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(
                "TensorFlow must be able to load the folder and to answer its "
                f"warm-up requests. Received: {folder}, and "
                f"{done.stderr.strip().splitlines()[-1]} Export it again."
            )
        facts = json.loads(done.stdout.splitlines()[-1])
        with np.load(answers) as stored:
            given = dict(stored)
    requests = facts["requests"]
    if not requests:
        raise ValueError(
            f"There must be warm-up requests to replay. Received: {folder} "
            "without any. Export it with `warmup=True`."
        )
    for request in requests:
        request["graph_bytes"] = facts["graph_bytes"][request["signature"]]
    for request, difference in zip(
        requests, _differences(folder, model, given), strict=True
    ):
        request["difference"] = difference
    return Check(
        folder=folder,
        weight_bytes=_size(folder / "variables"),
        disk_bytes=_size(folder),
        load_bytes=facts["load_bytes"],
        load_seconds=facts["load_seconds"],
        requests=requests,
    )


def _size(folder):
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())


def _differences(folder, model, given):
    """How far each answer is from the model's."""
    requests = replay.read_requests(folder)
    if model is None:
        return [None] * len(requests)
    card = json.loads((folder / CARD).read_text())
    if card["quantize_experts"] is not None:
        model = with_small_experts(model, card["quantize_experts"])
    differences = []
    for i, (name, inputs) in enumerate(requests):
        signature = card["signatures"][name]
        images = _images(signature["input"], inputs, card)
        dials = {k: signature[k] for k in DIALS if signature[k] is not None}
        if f"{i}/logits" not in given:
            differences.append(None)
            continue
        right = routed(model, dials).predict_on_batch(images)
        right = ops.convert_to_numpy(right)
        difference = np.abs(given[f"{i}/logits"] - right).max()
        differences.append(float(difference / max(1, np.abs(right).max())))
    return differences


def _images(kind, inputs, card):
    """The model's input for what a request holds."""
    (content,) = inputs.values()
    if kind == "float":
        return content
    preprocessing = card["preprocessing"]
    if kind == "encoded":
        crop = preprocessing["test_crop"]
        content = [decoded(x, card["image_size"], crop) for x in content]
    pixels = np.asarray(content, "float32")
    mean, std = (
        np.asarray(preprocessing[name], "float32") for name in ("mean", "std")
    )
    return pixels / std - mean / std


def report(checked):
    """A `Check` as text.

    Args:
        checked: A `Check`.

    Returns:
        String of several lines.
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

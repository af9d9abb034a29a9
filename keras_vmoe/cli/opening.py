"""Opening a model: its backend, classes and run folder."""

import importlib.util
import json
import os
import pathlib
import shlex
import sys

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training


def restart(backend, arguments):
    """Restarts this command under another backend.

    Keras has already chosen its backend, on import.
    """
    if importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"The backend must be installed. Received: backend={backend!r}. "
            f"Install it with: pip install 'keras_vmoe[{backend}]'"
        )
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-m", "keras_vmoe.cli", *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606


def open_model(model, classes=None, **dials):
    """A model from a run folder or `.keras` file, and its class names.

    For models of version 0.1.0 only the run knows how images are cropped.

    Args:
        model: Path.
        classes: File of names; None takes those of the run.
        **dials: Arguments of `models.set_routing`, None to keep a setting.
    """
    if pathlib.Path(model).is_dir():
        opened = training.restore(model)
    else:
        opened = models.load(model, compile=False)
    if any(value is not None for value in dials.values()):
        opened = models.set_routing(opened, **dials)
    default = data.Preprocessing(channels=opened.input_shape[-1])
    wanted = getattr(opened, "preprocessing", default)
    if wanted == default:
        crop = setting_of_run(model, "data.test_crop")
        wanted = data.Preprocessing.of(wanted, test_crop=crop)
    opened.preprocessing = wanted
    num_classes = opened.output_shape[-1]
    return opened, _class_names(classes, run_dir_of(model), num_classes)


def run_dir_of(model):
    """The run folder that a model is, or is in."""
    path = pathlib.Path(model)
    return path if path.is_dir() else path.parent


def setting_of_run(model, name):
    """A setting by its dotted name, of the run that a model is from, if any."""
    path = run_dir_of(model) / "config.yaml"
    value = training.recipes.read(path) if path.exists() else {}
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def of_run(model, command, dataset=None, split=None, data_dir=None):
    """Dataset, split and folder: those given, else those the run was tested on.

    Args:
        model: Path.
        command: Name of the command, for the message.
        dataset, split, data_dir: What is given.

    Raises:
        ValueError: If a dataset is neither given nor of a run.
    """
    there = setting_of_run(model, "data.dataset")
    folder = setting_of_run(model, "data.data_dir")
    if dataset in (None, there) and data_dir in (None, folder):
        dataset, data_dir = there, folder
        split = split or setting_of_run(model, "data.test_split")
    dataset = dataset or there
    if dataset is None:
        raise ValueError(
            "`dataset` must be given for a model that is not from a run. "
            f"Received: {model}. For example: keras-vmoe {command} "
            f"{shlex.quote(model)} digits"
        )
    return dataset, split or "test", data_dir


def load_images(model, dataset, split, data_dir, batch_size):
    """Images of a split as the model wants them, in order."""
    return data.load(
        dataset,
        split,
        image_size=model.input_shape[1:3],
        batch_size=batch_size,
        training=False,
        data_dir=data_dir,
        preprocessing=model.preprocessing,
    )


def numbers(num_classes):
    """Names for classes without names."""
    return [f"class {i}" for i in range(num_classes)]


def _brief(names):
    """A short description of the contents of a file of names."""
    if isinstance(names, list):
        return f"{len(names)} names, such as {names[:3]}"
    return str(names)[:200]


def _class_names(path, run_dir, num_classes):
    """Names from a file, else from the run folder, else numbers."""
    if path is None:
        path = run_dir / "classes.json"
        if not path.exists():
            return numbers(num_classes)
    try:
        names = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        names = error
    if not isinstance(names, list) or len(names) != num_classes:
        raise ValueError(
            f"The file of class names must hold a JSON list of {num_classes} "
            f'names, such as ["cat", "dog"]. Received: --classes {path} '
            f"({_brief(names)})."
        )
    return [str(name) for name in names]


def check_classes(path, model, names, dataset, data_dir):
    """Raises for a dataset of more or fewer classes; warns of other names."""
    classes, info = model.output_shape[-1], data.info(dataset, data_dir)
    if info.num_classes not in (None, classes):
        command = ["keras-vmoe", "train", "--init", path, "--freeze=backbone"]
        command += ["--dataset", dataset, "--run_dir=runs/tuned"]
        command += [f"--data_dir={data_dir}"] if data_dir else []
        raise ValueError(
            "The model must have the classes of the dataset. Received: a model "
            f"of {classes} classes for the {info.num_classes} of {dataset!r}. "
            f"Train its head on them: {shlex.join(command)}"
        )
    given = names != numbers(classes)
    if given and info.class_names and list(info.class_names) != names:
        print(
            f"keras-vmoe: warning: the classes of {dataset!r} have other names "
            "than those of the training: the accuracy is meaningful only if "
            "they are the same classes in the same order.",
            file=sys.stderr,
        )

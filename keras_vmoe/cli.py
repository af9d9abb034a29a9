"""The command `keras-vmoe`."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import traceback

import keras

from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import export
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe._extras import require
from keras_vmoe.cli_parser import make_parser
from keras_vmoe.cli_parser import normalized
from keras_vmoe.cli_parser import recipe_of
from keras_vmoe.models.presets import find_preset
from keras_vmoe.routing.groups import check_sizes

# What users can mend is printed as one message; anything else is a bug and
# keeps its traceback.
USER_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    training.callbacks.NonFiniteLossError,
)


def main(arguments=None):
    """Runs `keras-vmoe`.

    Args:
        arguments: Command line without the program's name; None means that of
            the process.

    Returns:
        Exit status: 0, or 1 after an error whose message was printed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    arguments = normalized(arguments)
    try:
        jsonargparse = require("jsonargparse", "cli")
        parser = make_parser(jsonargparse, recipe_of(arguments))
        settings = parser.instantiate(parser.parse_args(arguments))
        command = settings.subcommand
        COMMANDS[command](settings[command], arguments)
    except USER_ERRORS as error:
        print(f"keras-vmoe: error: {error}", file=sys.stderr)
        _leave_others()
        return 1
    except Exception:
        if distribution.num_processes() > 1:
            traceback.print_exc()
        _leave_others()
        raise
    return 0


def _leave_others():
    """Ends this process at once if it is one of several.

    JAX would wait for the others, which may wait for this one.
    """
    if distribution.num_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def train(settings, arguments):
    """`keras-vmoe train`: trains a model and prints its test accuracy."""
    names = [field.name for field in dataclasses.fields(training.TrainConfig)]
    config = training.TrainConfig(**{name: settings[name] for name in names})
    if settings.recipe is not None:
        training.recipes.find_recipe(settings.recipe).check_model(config)
    if config.backend not in (None, keras.backend.backend()):
        _restart(config.backend, arguments)
    distribution.initialize(
        settings.job_addresses, settings.num_processes, settings.process_id
    )
    first = distribution.is_first_process()
    if first:
        print(f"backend: {keras.backend.backend()}", flush=True)
    if settings.dry_run:
        print(training.describe(config))
        return
    result = training.train(config)
    if not first:
        return
    print(f"model: {result.run_dir / 'model.keras'}")
    print(f"history: {result.run_dir / 'history.csv'}")
    print(f"curves and load of every expert: {result.run_dir / 'curves.png'}")
    print(f"test accuracy: {result.test_accuracy:.4f}")


def predict(settings, arguments):
    """`keras-vmoe predict`: prints the classes of image files."""
    if settings.backend not in (None, keras.backend.backend()):
        _restart(settings.backend, arguments)
    model, names = _open_model(settings)
    test_crop = _setting_of_run(settings.model, "test_crop")
    size = model.input_shape[1:3]
    images = data.read_images(settings.images, size, test_crop)
    if settings.dry_run:
        resolved = _resolved(settings, test_crop=test_crop)
        print(evaluation.describe(model, resolved, len(images), 1))
        return
    shows = sys.stdout.isatty()
    found = evaluation.classify(model, images, names, settings.top, shows)
    for image, predictions in zip(settings.images, found, strict=True):
        classes = "  ".join(f"{name} {p:.3f}" for name, p in predictions)
        print(f"{image}: {classes}")


def evaluate(settings, arguments):
    """`keras-vmoe evaluate`: measures a model on a split of a dataset."""
    if settings.backend not in (None, keras.backend.backend()):
        _restart(settings.backend, arguments)
    model, names = _open_model(settings)
    _check_classes(settings, model, names)
    test_crop = settings.test_crop
    if test_crop is None:
        test_crop = _setting_of_run(settings.model, "test_crop")
    reads = (settings.dataset, settings.split, settings.data_dir)
    if settings.dry_run:
        resolved = _resolved(settings, test_crop=test_crop)
        count = data.num_images(*reads)
        size = settings.batch_size
        print(evaluation.describe(model, resolved, count, size))
        return
    images = data.load(
        settings.dataset,
        settings.split,
        model.input_shape[1:3],
        settings.batch_size,
        training=False,
        data_dir=settings.data_dir,
        num_classes=model.output_shape[-1],
        test_crop=test_crop,
        skip_corrupt=settings.skip_corrupt,
    )
    splits = [] if settings.skip_corrupt else [settings.split]
    with data.named_damage(settings.dataset, splits, settings.data_dir):
        measured = evaluation.measure(model, images, sys.stdout.isatty())
    print(evaluation.report(measured, names))


def _check_classes(settings, model, names):
    """Raises for a dataset of more or fewer classes, warns of other names."""
    classes = model.output_shape[-1]
    info = data.info(settings.dataset, settings.data_dir)
    known = info.num_classes
    if known not in (None, classes):
        raise ValueError(
            "The model must know the classes of the dataset. "
            f"Received: a model of {classes} classes for the {known} of "
            f"{settings.dataset!r}. Train its head on them: keras-vmoe train "
            f"--init {settings.model} --freeze backbone."
        )
    given = names != _numbers(classes)
    if given and info.class_names and list(info.class_names) != names:
        print(
            f"keras-vmoe: warning: the classes of {settings.dataset!r} have "
            "other names than those that the model was trained on: the "
            "accuracy means something only if they are the same classes in "
            "the same order.",
            file=sys.stderr,
        )


def presets(settings, arguments):
    """`keras-vmoe presets`: prints the models of the papers."""
    match = settings.match.lower()
    names = [name for name in models.presets() if match in name]
    if not names:
        models.from_preset(settings.match)  # Raises, with the nearest names.
    print(_PRESET_LINE.format(*_PRESET_COLUMNS))
    for name in names:
        preset = find_preset(name)
        with models.without_weights():
            classes = preset.paper_classes
            model = models.from_preset(name, num_classes=classes)
        cost = models.cost(model)
        row = (
            name,
            classes,
            f"{cost.params / 1e6:.1f}",
            preset.paper_params or "",
            f"{cost.active_params / 1e6:.1f}",
            preset.paper_active or "",
            f"{cost.flops / 1e9:.1f}",
            preset.paper_gflops or "",
        )
        print(_PRESET_LINE.format(*row), flush=True)
    print(
        "Millions of parameters, active ones per token, giga multiply-adds per "
        "image; paper: as printed there, empty where no figure is at hand. "
        "Counted with the classes of the paper's table; `from_preset` makes "
        "V-MoE with 21843 classes unless `num_classes` is set."
    )


_PRESET_LINE = "{:<27} {:>7} {:>8} {:>7} {:>8} {:>7} {:>7} {:>6}"
_PRESET_COLUMNS = (
    "preset", "classes", "params", "(paper)", "active", "(paper)", "GFLOPs",
    "(paper)",
)  # fmt: skip


def convert(settings, arguments):
    """`keras-vmoe convert`: writes other people's weights as a Keras model."""
    if settings.backend not in (None, keras.backend.backend()):
        _restart(settings.backend, arguments)
    output = pathlib.Path(settings.output)
    for good, what in (
        (output.suffix == ".keras", "it does not end in '.keras'"),
        (not output.exists(), "it exists"),
        (output.parent.is_dir(), "its folder does not exist"),
    ):
        if not good:
            raise ValueError(
                "The output must be a new file that ends in '.keras', in a "
                f"folder that exists. Received: {settings.output}, and {what}. "
                "Choose another name."
            )
    for name in ("image_size", "num_selected_experts"):
        value = getattr(settings, name)
        check_sizes(**{name: 1 if value is None else value})
    bar = None

    def progress(done, total):
        nonlocal bar
        bar = bar or keras.utils.Progbar(total, unit_name="byte")
        bar.update(done)

    arrays = checkpoints.read(settings.checkpoint, progress)
    config = checkpoints.vmoe_config(arrays, settings.image_size)
    if settings.num_selected_experts is not None:
        if config["moe"] is None:
            raise ValueError(
                "A dense model selects no experts. Received: "
                f"--num_selected_experts {settings.num_selected_experts}. "
                "Leave it out."
            )
        config["moe"]["num_selected_experts"] = settings.num_selected_experts
    model = checkpoints.load_vmoe(models.ViTMoE(**config), arrays)
    models.save(model, output)
    print(f"model: {output}, {model.count_params():,} parameters")


def export_model(settings, arguments):
    """`keras-vmoe export`: writes a model for servers or devices."""
    if settings.backend not in (None, keras.backend.backend()):
        _restart(settings.backend, arguments)
    model, names = _open_model(settings)
    dials = {
        "images_per_group": settings.images_per_group,
        "capacity_factor": settings.capacity_factor,
        "quantize_experts": settings.quantize_experts,
    }
    table = [_signature(text) for text in settings.signatures]
    if settings.format != "saved_model":
        if table:
            raise ValueError(
                "Only a SavedModel has signatures. Received: --signatures with "
                f"--format {settings.format}. Leave them out."
            )
        write = getattr(export, settings.format)
        print(f"model: {write(model, settings.output, **dials)}")
        return
    classes = model.output_shape[-1]
    path = export.saved_model(
        model,
        settings.output,
        settings.version,
        table,
        warmup=settings.warmup,
        preprocessing=export.Preprocessing(
            test_crop=_setting_of_run(settings.model, "test_crop")
        ),
        class_names=None if names == _numbers(classes) else names,
        card=_card(settings.model),
        **dials,
    )
    print(f"model: {path}")


def serve_check(settings, arguments):
    """`keras-vmoe serve-check`: replays an export's warm-up requests."""
    if settings.backend not in (None, keras.backend.backend()):
        _restart(settings.backend, arguments)
    model = None
    if settings.model is not None:
        model, _ = _open_model(settings)
    checked = export.check(settings.directory, model, settings.rounds)
    print(export.report(checked))
    if not checked.agrees:
        raise ValueError(
            "The answers must be those of the model. Received: the differences "
            "above, relative to the largest number. Give the model that was "
            "exported."
        )


def _signature(text):
    """`fast:capacity_factor=0.5,batch_priority=true` as name and settings."""
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not colon or not all(key and value for key, _, value in pairs):
        raise ValueError(
            "A signature is written as NAME:SETTING=VALUE,SETTING=VALUE. "
            f"Received: --signatures {text}. Write for example "
            "fast:capacity_factor=0.5,batch_priority=true."
        )
    read = require("yaml", "cli").safe_load
    return name, {key: read(value) for key, _, value in pairs}


def _card(model):
    """What a run folder knows for the model card."""
    path = pathlib.Path(model)
    path = (path if path.is_dir() else path.parent) / "result.json"
    card = {}
    if path.exists():
        card["test_accuracy"] = json.loads(path.read_text())["accuracy"]
    for name in ("preset", "dataset"):
        value = _setting_of_run(model, name)
        if value is not None:
            card[name] = value
    return card


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export_model,
    "serve-check": serve_check,
    "convert": convert,
    "presets": presets,
}


def _restart(backend, arguments):
    """Starts this command anew under another backend.

    Keras binds its backend when it is imported, which this module has done.
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


def _open_model(settings):
    """The model of a run folder or file, and the names of its classes."""
    path = pathlib.Path(settings.model)
    run_dir = path if path.is_dir() else path.parent
    file = path / "model.keras" if path.is_dir() else path
    model = models.load(file, compile=False)
    classes = model.output_shape[-1]
    return model, _class_names(settings.classes, run_dir, classes)


def _setting_of_run(model, name):
    """A setting of the run that a model is from; None without a run."""
    path = pathlib.Path(model)
    path = (path if path.is_dir() else path.parent) / "config.yaml"
    if not path.exists():
        return None
    return require("yaml", "cli").safe_load(path.read_text()).get(name)


def _resolved(settings, **found):
    """The configuration of a command, with what was found for it."""
    plain = {**vars(settings), "backend": keras.backend.backend(), **found}
    return {k: v for k, v in plain.items() if k not in ("config", "dry_run")}


def _numbers(num_classes):
    """Names of classes that have none."""
    return [f"class {i}" for i in range(num_classes)]


def _class_names(path, run_dir, num_classes):
    """Names from a file, else from the run folder, else plain numbers."""
    if path is None:
        path = run_dir / "classes.json"
        if not path.exists():
            return _numbers(num_classes)
    try:
        names = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        names = error
    if not isinstance(names, list) or len(names) != num_classes:
        raise ValueError(
            f"The file of class names must hold a JSON list of {num_classes} "
            f'names, such as ["cat", "dog"]. Received: --classes {path} '
            f"({names})."
        )
    return [str(name) for name in names]


if __name__ == "__main__":
    sys.exit(main())

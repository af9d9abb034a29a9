"""`train`, `evaluate` and `predict`."""

import dataclasses
import sys

import keras

from keras_vmoe import data
from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import training
from keras_vmoe.cli.opening import numbers
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import restart
from keras_vmoe.cli.opening import setting_of_run
from keras_vmoe.data import _corruption
from keras_vmoe.data.schema import num_images
from keras_vmoe.distribution import _processes
from keras_vmoe.evaluation import _description


def train(settings, arguments):
    """`keras-vmoe train`: trains a model and prints its test accuracy."""
    names = [field.name for field in dataclasses.fields(training.TrainConfig)]
    config = training.TrainConfig(**{name: settings[name] for name in names})
    if settings.recipe is not None:
        training.recipes.find_recipe(settings.recipe).check_model(config)
    if config.backend not in (None, keras.backend.backend()):
        restart(config.backend, arguments)
    distribution.initialize(
        settings.job_addresses, settings.num_processes, settings.process_id
    )
    first = _processes.is_first_process()
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
        restart(settings.backend, arguments)
    model, names = open_model(settings.model, settings.classes)
    test_crop = setting_of_run(settings.model, "test_crop")
    size = model.input_shape[1:3]
    images = data.read_images(settings.images, size, test_crop)
    if settings.dry_run:
        resolved = _resolved(settings, test_crop=test_crop)
        print(_description.describe(model, resolved, len(images), 1))
        return
    shows = sys.stdout.isatty()
    found = evaluation.classify(model, images, names, settings.top, shows)
    for image, predictions in zip(settings.images, found, strict=True):
        classes = "  ".join(f"{name} {p:.3f}" for name, p in predictions)
        print(f"{image}: {classes}")


def evaluate(settings, arguments):
    """`keras-vmoe evaluate`: measures a model on a split of a dataset."""
    if settings.backend not in (None, keras.backend.backend()):
        restart(settings.backend, arguments)
    model, names = open_model(settings.model, settings.classes)
    _check_classes(settings, model, names)
    test_crop = settings.test_crop
    if test_crop is None:
        test_crop = setting_of_run(settings.model, "test_crop")
    reads = (settings.dataset, settings.split, settings.data_dir)
    if settings.dry_run:
        resolved = _resolved(settings, test_crop=test_crop)
        count = num_images(*reads)
        size = settings.batch_size
        print(_description.describe(model, resolved, count, size))
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
    with _corruption.named_corruption(
        settings.dataset, splits, settings.data_dir
    ):
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
    given = names != numbers(classes)
    if given and info.class_names and list(info.class_names) != names:
        print(
            f"keras-vmoe: warning: the classes of {settings.dataset!r} have "
            "other names than those that the model was trained on: the "
            "accuracy means something only if they are the same classes in "
            "the same order.",
            file=sys.stderr,
        )


def _resolved(settings, **found):
    """The configuration of a command, with what was found for it."""
    plain = {**vars(settings), "backend": keras.backend.backend(), **found}
    return {k: v for k, v in plain.items() if k not in ("config", "dry_run")}

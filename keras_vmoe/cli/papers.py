"""`presets` and `convert`: the papers' models and other people's weights."""

import pathlib

import keras

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe._checks import check_sizes
from keras_vmoe.cli.opening import restart
from keras_vmoe.models.presets import find_preset


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
            f"{cost.macs / 1e9:.1f}",
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
        restart(settings.backend, arguments)
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

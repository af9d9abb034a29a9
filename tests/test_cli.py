"""The command as users type it."""

import csv
import io
import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_vmoe
from keras_vmoe import cli
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import VIT_SIZES
from keras_vmoe.training.typed import kinds_of
from tests.commands import SMALL
from tests.commands import run
from tests.golden.models import FOLDER

# `make check-quickstart` trains on JAX.
trains = pytest.mark.backends("tensorflow", "torch")
# Nothing of it depends on the backend.
once = pytest.mark.backends("torch")


@trains
def test_train_ends_with_the_test_accuracy(trained):
    run_dir, output = trained
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(r"test accuracy: [01]\.\d{4}", last)
    curves = f"curves and load of every expert: {run_dir / 'curves.png'}"
    assert curves in output
    assert "model: ViT of 1 block, 16 features, 4 experts in every_1" in output
    assert "data: digits, train[:128], in 2 epochs" in output
    assert "Ctrl-C stops the run; the same command resumes it" in output
    assert "max_expert_load" in output
    assert (
        f"backend: {keras.backend.backend()}"
        in (run_dir / "config.yaml").read_text()
    )


@once
def test_configuration_file_repeats_the_run(trained, tmp_path):
    run_dir, output = trained
    done = run(
        "train",
        f"--config={run_dir / 'config.yaml'}",
        f"--run_dir={tmp_path / 'again'}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == output.splitlines()[-1]
    again = (tmp_path / "again" / "history.csv").read_text()
    assert again == (run_dir / "history.csv").read_text()


@trains
def test_predict_prints_classes_with_probabilities(trained, tmp_path):
    run_dir, _ = trained
    image = tmp_path / "digit.png"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    done = run("predict", run_dir, image, "--top", 2)
    assert done.returncode == 0, done.stderr
    line = rf"{re.escape(str(image))}: (\d) (0\.\d+)  (\d) (0\.\d+)"
    assert re.fullmatch(line, done.stdout.strip())
    by_file = run("predict", run_dir / "model.keras", image, "--top", 2)
    assert by_file.stdout == done.stdout


@once
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--epochs=many"], "epochs"),
        (["train", "--epohs=3"], "Did you mean '--epochs'?"),
        (["train", "--optimizer.help"], "run: keras-vmoe train --help\n"),
        (["train", "--moe.num_expert=4"], "Did you mean 'num_experts'?"),
        (["train", "--moe.num_experts=x"], "`moe.num_experts` must be INT"),
        (["train", "--moe", "{num_experts: x}"], "`moe.num_experts` must be I"),
        (
            ["train", "--moe=[1,2]"],
            "such as --moe.layers. Received: --moe [1, ",
        ),
        (["train", "--remat=maybe"], "`model.remat` must be true or false"),
        (["train", "--augmentation.flip=x"], "flip` must be true or false. R"),
        (["train", "--class_weights=a"], "`data.class_weights` must be a list"),
        (["train", "--convnext.dims=x"], "s` must be a list of INT. Received:"),
        (["train", "--convnext.dim=[8]"], "--convnext.dim [8]. Did you mean"),
        (["train", "--optimizer=adam"], "one by one, such as --optimizer.name"),
        (["train", "--optimizer={lr: 1}"], "no such setting. Received: --opti"),
        (["train", "--model.widht=3"], "arguments: --model.widht=3.\n"),
        (["train", "--data.batch_sise=3"], "Did you mean '--data.batch_size'?"),
        (["train", "--recipe=vmoe_finetune"], "Set init, such as --init CHECK"),
        (["train", "--model.pooling=mean"], "pooling"),
        (["train", "--run_dir=x", "--dataset=digitz"], "name='digitz'"),
        (["train", "--run_dir=x", "--epochs=0"], "epochs=0"),
        (["train", "--run_dir=x", "--seed=-1"], "seed=-1"),
        (
            ["train", "--recipe=digits_small", "--epochs=3"],
            "which may be a recipe's. Set it too, such as --warmup_epochs 0.3",
        ),
        (
            ["train", "--run_dir=x", "--validation_split=val"],
            "an 'validation'?",
        ),
        (["train", "--config=none.yaml"], "none.yaml"),
        (["predict", "none.keras", "a.png"], "must exist. Received: path="),
        (["train", "--optimizer.schedule=steps"], "schedule"),
        (["train", "--backend=pytorch"], "pytorch. Did you mean 'torch'?"),
        (["train", "--split=val"], "--split=val. Did you mean '--test_split'"),
        (["export", "a", "b", "--overwrite"], "arguments: --overwrite.\n"),
        (["predict"], "model"),
        (["predict", "a"], "predict model images [options]\n"),
        (["trian"], "Did you mean 'train'?"),
        ([], "subcommand"),
    ],
)
def test_bad_command_lines(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert len(done.stderr) < 800  # A message, not a wall of usage.
    assert not done.stdout  # What is refused is not announced.
    assert not list(tmp_path.iterdir())


@once
def test_predict_takes_gray_and_transparent_images(trained, tmp_path):
    gray = np.full((12, 8, 1), 128)
    lines = []
    for name, image in {
        "gray.png": gray,
        "color.png": np.repeat(gray, 3, axis=-1),
        "transparent.png": np.repeat(gray, 4, axis=-1),
    }.items():
        keras.utils.save_img(tmp_path / name, image, scale=False)
        lines.append(run("predict", trained[0], tmp_path / name).stdout)
    assert len({line.split(": ")[1] for line in lines}) == 1


@once
def test_predict_names_each_file_that_is_no_image(trained, tmp_path):
    for name in ("a.tif", "b.ppm"):
        (tmp_path / name).write_bytes(b"II*\0")
    done = run("predict", trained[0], tmp_path / "a.tif", tmp_path / "b.ppm")
    first, second = done.stderr.splitlines()
    assert "must be a readable PNG, JPEG, WebP, BMP or GIF. Received" in first
    assert second.startswith(f"Received: path={str(tmp_path / 'b.ppm')!r} (it")


@once
def test_null_trains_the_dense_twin(tmp_path):
    dense = [argument for argument in SMALL if "--moe" not in argument]
    run_dir = tmp_path / "dense"
    done = run(
        "train", *dense, "--moe=null", "--epochs=1", "--run_dir", run_dir
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy: " in done.stdout
    assert f"curves: {run_dir / 'curves.png'}" in done.stdout
    assert "data: digits, train[:128], in 1 epoch\n" in done.stdout
    again = run("train", *dense, "--moe=null", "--run_dir", run_dir)
    assert "holds a finished run" in again.stderr and not again.stdout
    assert "auxiliary_loss" not in (run_dir / "history.csv").read_text()
    assert models.load(run_dir / "model.keras").moe_layers == []


@once
def test_version():
    assert run("--version").stdout == f"keras-vmoe {keras_vmoe.__version__}\n"


@once
@pytest.mark.parametrize("names", ['{"0": "a"}', '["a", "b"]', "a, b"])
def test_bad_class_names(trained, tmp_path, names):
    image, file = tmp_path / "digit.png", tmp_path / "names.json"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    file.write_text(names)
    done = run("predict", trained[0], image, "--classes", file)
    assert done.returncode == 1
    assert "names" in done.stderr
    assert "Received:" in done.stderr


@trains
def test_predictions_do_not_depend_on_each_other(trained, tmp_path):
    rng = np.random.default_rng(0)
    names = [tmp_path / f"{i}.png" for i in range(4)]
    for name in names:
        image = rng.integers(0, 255, (8, 8, 1))
        keras.utils.save_img(name, image, scale=False)
    together = run("predict", trained[0], *names).stdout.splitlines()
    alone = [run("predict", trained[0], name).stdout.strip() for name in names]
    assert together == alone


@once
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("swapped.png", b"", "must end in '.keras'. Received: path="),
        ("empty.keras", b"PK\x05\x06" + bytes(18), "without a model in it"),
    ],
)
def test_predict_refuses_what_is_no_model(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    done = run("predict", tmp_path / name, "image.png")
    assert done.returncode == 1
    assert words in done.stderr


@once
def test_predict_names_what_is_no_image(trained, tmp_path):
    """The others are answered."""
    broken, image = tmp_path / "broken.png", tmp_path / "digit.png"
    broken.write_bytes(b"no picture")
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    for images, answers in (([broken], 0), ([image, broken, image], 2)):
        done = run("predict", trained[0], *images, tmp_path)
        assert f"a folder. Name its images: {tmp_path}/*" in done.stderr
        assert done.returncode == 1 and "broken.png" in done.stderr
        assert done.stdout.count("digit.png: ") == answers
        assert "broken.png" not in done.stdout


@once
def test_a_warning_is_one_line(monkeypatch):
    said, usual = [], warnings.formatwarning

    def presets():
        """Warn.

        Example:
            keras-vmoe presets
        """
        said.append(warnings.formatwarning("words", UserWarning, "x.py", 1))

    monkeypatch.setitem(cli.COMMANDS, "presets", presets)
    assert cli.main(["presets"]) == 0
    assert said == ["keras-vmoe: warning: words\n"]
    assert warnings.formatwarning is usual


@once
def test_names_that_the_output_cannot_hold(trained, tmp_path, monkeypatch):
    """As under LC_ALL=C, where print would raise after all the work."""
    image, names = tmp_path / "digit.png", tmp_path / "names.json"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    names.write_text(json.dumps(list("äöüабвгде字")))
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    command = ["predict", trained[0], image, f"--classes={names}", "--top=10"]
    assert cli.main([str(x) for x in command]) == 0
    ascii_only.flush()
    assert rb"\u5b57" in ascii_only.buffer.getvalue()


@once
def test_another_backend_starts_the_command_anew(monkeypatch):
    """`make check-quickstart` sees that process train on JAX."""
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    run("train", "--backend=jax", "--epochs=3", "--dry_run")
    ((program, command, environment),) = started
    assert program == command[0] == sys.executable
    assert command[1:3] == ["-m", "keras_vmoe.cli"]
    assert command[3:] == ["train", "--backend=jax", "--epochs=3", "--dry_run"]
    assert environment["KERAS_BACKEND"] == "jax"


@once
@pytest.mark.parametrize("program", ["/bin/keras-vmoe", "mine.py"])
def test_an_unknown_backend_is_one_line(monkeypatch, program):
    """The command ends; an import raises."""
    words = "KERAS_BACKEND must be one of jax, tensorflow, torch. Received: "
    handlers, ends = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(os, "_exit", ends.append)
    code = Path(keras_vmoe.__file__).with_name("_start.py").read_text()
    monkeypatch.setenv("KERAS_BACKEND", "pytorch")
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["python", program])
    error = SystemExit if "keras" in program else ImportError
    with pytest.raises(error, match=f"{words}KERAS_BACKEND=pytorch") as ended:
        exec(code, {})
    assert ("before --backend" in str(ended.value)) == ("keras" in program)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    exec(code, {})
    assert ("TF_CPP_MIN_LOG_LEVEL" in os.environ) == ("keras" in program)
    # A stop while Keras is imported.
    for number, handler in handlers.items():
        handler(number, None)
    assert ends == ([130, 143] if "keras" in program else [])


@once
@pytest.mark.parametrize(
    "command, words",
    [
        ([], ["train", "predict"]),
        (
            ["train"],
            ["--moe", "--epochs INT", "--learning_rate FLOAT", "examples:"],
        ),
        (["predict"], ["images", "--top INT", "examples:"]),
    ],
)
def test_help(command, words):
    done = run(*command, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in words)
    assert len(done.stdout.splitlines()) <= 92
    assert max(map(len, done.stdout.splitlines())) <= 80


@once
def test_every_setting_has_a_flag_and_help():
    """In the help of `train`, or in that of a ViT's sizes."""
    shown = run("train", "--help").stdout
    sizes = run("train", "--model.help").stdout
    kinds = kinds_of(training.TrainConfig)
    names = [name for name in kinds if name not in GROUPS]
    names += [name for group in GROUPS for name in kinds_of(kinds[group])]
    for name in names:
        text = sizes if name in VIT_SIZES else shown
        assert re.search(rf"^  --(optimizer\.)?{name} +\S", text, re.M), name
    assert "FLOAT|dropless" in shown
    assert "Run folder" in run("evaluate", "--help").stdout


# Models of the papers and other people's weights.


@once
def test_presets():
    done = run("presets", "convnext_t_e4")
    assert done.returncode == 0
    header, row, *_ = done.stdout.splitlines()
    assert header.split()[:3] == ["preset", "classes", "params"]
    values = "convnext_t_e4_last2_r2 1000 34.5 34.5 25.6 25.6 4.2 4.2 82.1 768"
    assert row.split() == values.split()
    (found,) = json.loads(
        run("presets", "t_e4_last2_r2", "--format", "json").stdout
    )
    assert found["paper_params"] == 34.5 and found["note"] is None
    lines = run("presets", "soft", "--format=csv").stdout.splitlines()
    assert len(list(csv.DictReader(lines))) == 5
    done = run("presets", "convnet_t")
    assert done.returncode == 1 and "nearest names: convnext_t" in done.stderr
    lines = run("presets").stdout.splitlines()
    notes = [line for line in lines if ": " in line and line[0] in "cvs"]
    assert len(lines) - len(notes) == len(models.presets()) + 2
    assert "vit_s16_e8_last2: the printed active count" in "\n".join(notes)


def test_convert(tmp_path):
    prefix = FOLDER / "vit_checkpoint" / "ckpt_1"
    output = tmp_path / "vmoe.keras"
    arguments = ("convert", prefix, output, "--num_selected_experts=1")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"model: {output}, 376,202 parameters" in done.stdout
    assert "1504808/1504808" in done.stdout  # The progress bar, in bytes.
    model = models.load(output)
    assert model.moe.num_selected_experts == 1
    again = run(*arguments)
    assert again.returncode == 1 and "must be a new file" in again.stderr


@once
def test_convert_resizes(tmp_path):
    prefix = FOLDER / "vit_checkpoint" / "ckpt_1"
    output = tmp_path / "large.keras"
    done = run("convert", prefix, output, "--image_size=24")
    assert done.returncode == 0, done.stderr
    assert models.load(output).input_shape == (None, 24, 24, 3)


@once
def test_convert_without_a_checkpoint(tmp_path):
    done = run("convert", tmp_path / "none", tmp_path / "x.keras")
    assert done.returncode == 1 and "none.index" in done.stderr
    assert not list(tmp_path.iterdir())
    done = run("convert", tmp_path, tmp_path / "x.keras")
    assert "need no conversion" in done.stderr


@once
def test_dry_run(tmp_path):
    folder = tmp_path / "none"
    done = run("train", *SMALL, f"--run_dir={folder}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "steps: 4 per epoch, 8 in all" in done.stdout
    assert not folder.exists()


@once
def test_a_recipe_sets_the_defaults(tmp_path):
    arguments = [x for x in SMALL if "epochs" not in x and "warmup" not in x]
    done = run(
        "train", *arguments, "--recipe=cifar10_small", "--dry_run",
        "--run_dir", tmp_path / "none", "--dataset=digits",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epochs: 6" in done.stdout and "flip: true" in done.stdout
    # Epochs of warm-up stay as many: 0.6 of four steps each.
    assert "steps: 4 per epoch, 24 in all, 2 of warm-up" in done.stdout
    assert "batch_size: 32" in done.stdout  # What is given counts.
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "recipe: sweet_spot_vit_in21k\npreset: vit_b16_e8_last2\n"
        "moe: {num_experts: 4}\n"
    )
    small = (
        *SMALL[:3],
        "--batch_size=32",
        "--dataset=digits",
        "--moe.capacity_factor=2",
    )
    done = run("train", *small, f"--config={file}", "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (
        "name: lamb",
        "epochs: 90",
        "vit_b16: 0.1",
        "layers: last_2, num_experts: 4",
        "capacity_factor: 2.0",
    ):
        assert words in done.stdout
    done = run("train", "--recipe=cifar10", "--dry_run")
    assert done.returncode == 1 and "Did you mean 'cifar10_" in done.stderr

"""The commands beside `train`: what they read, refuse and announce."""

import os
import re
import shlex
import shutil
import signal
import threading
import time

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from keras_vmoe import cli
from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import checkpointing
from keras_vmoe.training.checkpointing import Checkpoints
from tests.commands import SMALL
from tests.commands import in_a_terminal
from tests.commands import run
from tests.commands import write_folder
from tests.golden.models import FOLDER

# `test_cli.py` trains and predicts on every backend.
pytestmark = pytest.mark.backends("torch")


@pytest.mark.slow
def test_fine_tuning_of_a_reference_checkpoint(tmp_path):
    """To other classes and another resolution; all but the head is kept."""
    prefix = FOLDER / "vit_checkpoint" / "ckpt_1"
    splits = ("train", "validation", "test")
    data_dir = write_folder(tmp_path / "images", "abc", splits, 4)
    sizes = {"image_size": 24, "patch_size": 4, "hidden_dim": 64,
             "num_layers": 4, "num_heads": 4, "mlp_dim": 128,
             "pooling": "token", "representation_size": 64}  # fmt: skip
    with pytest.warns(UserWarning, match="has 10 classes .* the model 3"):
        done = run(
            "train", f"--init={prefix}", "--dataset=image_folder", data_dir,
            "--freeze=backbone", "--epochs=1", "--batch_size=4",
            "--moe.layers=last_2", "--moe.num_experts=8",
            f"--run_dir={tmp_path / 'run'}",
            *(f"--model.{name}={value}" for name, value in sizes.items()),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test accuracy: " in done.stdout
    tuned = models.load(tmp_path / "run" / "model.keras")
    assert tuned.input_shape == (None, 24, 24, 3)
    assert tuned.output_shape == (None, 3)
    output = tmp_path / "vmoe.keras"
    run("convert", prefix, output, "--image_size=24")
    theirs = {w.path: np.array(w) for w in models.load(output).weights}
    kept = [w for w in tuned.weights if not w.path.startswith("head/")]
    kept = [w for w in kept if "seed" not in w.path and w.ndim > 1]
    assert len(kept) > 30
    for weight in kept:
        np.testing.assert_array_equal(np.array(weight), theirs[weight.path])


@pytest.mark.slow
def test_a_corrupt_record_is_named(trained, tmp_path):
    """A bit is flipped in a TFRecord, behind what is checked at the start."""
    data.info("digits", str(tmp_path))  # Writes it.
    corrupt = {}
    for split, number in (("train", 7), ("test", 3)):
        (path,) = tmp_path.rglob(f"digits-{split}.tfrecord*")
        records = [x.numpy() for x in tf.data.TFRecordDataset(str(path))]
        place = sum(16 + len(x) for x in records[:number])
        content = bytearray(path.read_bytes())
        content[place + 12 + len(records[number]) // 2] ^= 1
        path.write_bytes(content)
        corrupt[split] = f"{path}, record {number}"
    data_dir = f"--data_dir={tmp_path}"
    run_dir = f"--run_dir={tmp_path / 'run'}"
    done = run("train", *SMALL, data_dir, run_dir)
    assert done.returncode == 1 and corrupt["train"] in done.stderr
    arguments = ("evaluate", trained[0], "digits", data_dir)
    done = run(*arguments)
    assert done.returncode == 1 and corrupt["test"] in done.stderr
    with pytest.warns(UserWarning, match="record 3 of"):
        done = run(*arguments, "--skip-corrupt")
    assert done.returncode == 0 and "images: 363" in done.stdout


def test_evaluate(trained):
    run_dir, printed = trained
    done = run("evaluate", run_dir, "digits")  # On what the run was tested on.
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("data: digits, test[:32]\n")
    assert "images: 32" in done.stdout and "top-5 accuracy: " in done.stdout
    accuracy = re.search(r"test accuracy: ([\d.]+)", printed)[1]
    assert f"accuracy: {accuracy}" in done.stdout
    assert "block_0_moe: " in done.stdout


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stopped_run_says_how_to_resume(tmp_path, number, status):
    """One line, no traceback; the model of the last epoch is there."""
    run_dir = tmp_path / "my run"
    kept = Checkpoints(run_dir / "checkpoints")

    def stop():
        while not kept.epochs():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    done = run("train", *SMALL, "--epochs=99", f"--run_dir={run_dir}")
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    command = f"keras-vmoe train --config '{run_dir / 'config.yaml'}'"
    words = rf"stopped after epoch \d+ of 99. Resume with: {command}\n$"
    assert re.search(words, done.stderr)
    assert models.load(run_dir / "model.keras").count_params() > 0
    assert not list(run_dir.glob(".partial*"))


@pytest.mark.parametrize("swallows", [False, True])
def test_a_stop_that_a_library_keeps(monkeypatch, swallows):
    """TensorFlow's C++ makes another error of it; some imports go on."""
    monkeypatch.setattr(cli, "SECONDS", 0.1)

    def presets():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            if not swallows:
                raise RuntimeError("not ok") from error
        time.sleep(10)

    monkeypatch.setattr(models, "presets", presets)
    handler = signal.getsignal(signal.SIGTERM)
    done = run("presets")
    assert done.returncode == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert done.stderr == "\nkeras-vmoe: stopped\n"


def test_the_dial(trained):
    """By flags, as `models.set_routing` in Python."""
    dropped = []
    for dial in ([], ["--capacity_factor=0.25", "--batch_priority"]):
        done = run("evaluate", trained[0], "--split=test[:32]", *dial)
        assert done.returncode == 0, done.stderr
        found = re.search(r"block_0_moe: ([\d.]+)% dropped", done.stdout)
        dropped.append(float(found[1]))
    assert dropped[0] + 20 < dropped[1]


def test_dry_runs_of_evaluate_and_predict(trained, tmp_path):
    """From a file and flags: what is given by flags counts."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"model: {trained[0]}\ndataset: digits\nsplit: test[:50]\n"
        "batch_size: 16\ntest_crop: 0.5\n"
    )
    plain = run("evaluate", "--config", file)
    assert plain.returncode == 0, plain.stderr
    assert "images: 50" in plain.stdout
    more = ("--split=test[:40]", "--dry-run", "--skip_corrupt")
    done = run("evaluate", *more, f"--config={file}")
    assert done.returncode == 0, done.stderr
    for words in (
        "split: test[:40]", "batch_size: 16", "test_crop: 0.5",
        "skip_corrupt: true", f"backend: {keras.backend.backend()}",
        "million active per token", "memory, estimated", "classes: 10",
        "images: 40, in 3 steps",
    ):  # fmt: skip
        assert words in done.stdout
    assert "accuracy" not in done.stdout and "dry_run" not in done.stdout

    image = tmp_path / "digit.png"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    file.write_text(f"model: {trained[0]}\ntop: 2\n")
    done = run("predict", trained[0], image, image, "--config", file)
    assert done.stdout.count("digit.png: ") == 2
    assert all(len(x.split()) == 5 for x in done.stdout.splitlines())
    done = run("predict", trained[0], image, "--dry_run", f"--config={file}")
    assert done.returncode == 0, done.stderr
    assert "top: 2" in done.stdout and "images: 1, in 1 step\n" in done.stdout
    missing = run("predict", trained[0], tmp_path / "no.png", "--dry_run")
    assert missing.returncode == 1 and "no.png" in missing.stderr
    done = run("evaluate", trained[0], "digits", "--split=tes", "--dry_run")
    words = r"classes: 10\nnote: an evaluation would be refused. .* 'test'\?"
    assert re.search(words, done.stdout) and done.returncode == 0
    done = run("evaluate", trained[0], "digits", "--tensorboard")
    assert done.returncode != 0 and "--tensorboard" in done.stderr


FLAGS = {
    "--data.batch_size=16": "batch_size: 16",
    "--augmentation.flip=true": "flip: true",
    "--data.augmentation.mixup=0.5": "mixup: 0.5",
    "--class_weights=[1,2,1,1,1,1,1,1,1,1]": "- 2.0",
    "--optimizer.name=sgd": "name: sgd",
    "--clip-norm=2": "clip_norm: 2.0",
    "--moe.capacity_factor=2": "capacity_factor: 2.0",
    "--checkpoint.keep_checkpoints=3": "keep_checkpoints: 3",
    "--skip-corrupt": "skip_corrupt: true",
    "--tensorboard": "tensorboard: true",
    "--decay_gates=false": "decay_gates: false",
}


def test_flags_reach_the_settings(tmp_path):
    """With their group and without it; switches without a value."""
    more = ["--moe.num_experts", "16", f"--run_dir={tmp_path / 'run'}"]
    done = run("train", *SMALL, *FLAGS, *more, "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (*FLAGS.values(), "num_experts: 16"):
        assert words in done.stdout


@pytest.mark.parametrize("first", [True, False])
def test_flags_count_more_than_a_file(tmp_path, first):
    """Wherever the file is named; what is in neither is as in the file."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "optimizer: {warmup: 0.25, ema: 0.9}\nmoe: {num_experts: 2, "
        "layers: [0]}\ndata: {augmentation: {flip: true}}\n"
    )
    arguments = [*SMALL[:-2], "--moe.num_experts=4", "--dry_run"]
    config = ["--config", str(file)]
    arguments = [*config, *arguments] if first else [*arguments, *config]
    done = run("train", *arguments, f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    for words in ("num_experts: 4", "ema: 0.9", "warmup: 0.5", "flip: true"):
        assert words in done.stdout
    assert "layers:\n  - 0\n" in done.stdout


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        (["train"], "epohs: 2", "epohs=2. Did you mean 'epochs'"),
        (["train"], "moe: {num_expert: 2}", "Did you mean 'num_experts'"),
        (["evaluate"], "bach_size: 2", "Did you mean 'batch_size'"),
    ],
)
def test_an_unknown_key_of_a_file_is_named(tmp_path, command, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    done = run(*command, "--config", file)
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr) < 800
    assert "'help'" not in done.stderr and "'config'" not in done.stderr


def test_a_stopped_run_is_evaluated_from_its_checkpoint(trained, tmp_path):
    """As a finished one, but for the averages that a finished one has."""
    run_dir = tmp_path / "run"
    arguments = ("train", *SMALL, "--epochs=3", f"--run_dir={run_dir}")
    kill = checkpointing.SaveCheckpoint.on_epoch_begin

    def killed(self, epoch, logs=None):
        if epoch == 2:
            raise SystemExit(137)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing.SaveCheckpoint, "on_epoch_begin", killed)
        assert run(*arguments).returncode == 137
    assert kill is checkpointing.SaveCheckpoint.on_epoch_begin
    assert not (run_dir / "model.keras").exists()
    done = run("evaluate", run_dir, "digits", "--split=test[:32]")
    assert done.returncode == 0, done.stderr
    # Two epochs at the rate of three: not those of `trained`, nor of a start.
    kept = training.restore(run_dir)
    assert len(checkpointing.Checkpoints(run_dir / "checkpoints").epochs()) == 2
    image = tmp_path / "digit.png"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    predicted = run("predict", run_dir, image)
    models.save(kept, tmp_path / "kept.keras")
    again = run("predict", tmp_path / "kept.keras", image)
    shares = [re.findall(r"0\.\d+", x.stdout) for x in (predicted, again)]
    assert shares[0] == shares[1] and len(shares[0]) == 3
    assert run(*arguments).returncode == 0


@pytest.mark.slow
def test_progress_bars_in_a_terminal(trained, tmp_path):
    image = tmp_path / "digit.png"
    keras.utils.save_img(image, np.full((8, 8, 1), 128), scale=False)
    digits = ("digits", "--split=test[:32]", "--batch_size=8")
    outputs = in_a_terminal(
        ("train", *SMALL, "--epochs=1", f"--run_dir={tmp_path}/run"),
        ("evaluate", trained[0], *digits),
        ("predict", trained[0], image, image),
    )
    for steps, output in zip((4, 4, 2), outputs, strict=True):
        assert output.endswith("0"), output
        # Two steps may be over before the first would be shown.
        for step in (1, steps)[steps == 2 :]:
            assert re.search(rf"{step}/{steps} ━", output), output


def test_the_crop_of_a_run_holds_for_evaluate_and_predict(trained, tmp_path):
    """A run folder is believed; a file by itself knows of no crop."""
    shutil.copytree(trained[0], tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text()
    assert "test_crop: null" in text
    settings.write_text(text.replace("test_crop: null", "test_crop: 0.5"))
    image = tmp_path / "digit.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 1))
    keras.utils.save_img(image, pixels, scale=False)
    digits = ("digits", "--split=test[:32]")
    for command, rest in (("evaluate", digits), ("predict", (image,))):
        plain, cropped = (
            run(command, folder, *rest)
            for folder in (trained[0], tmp_path / "run")
        )
        assert plain.returncode == cropped.returncode == 0
        assert plain.stdout != cropped.stdout
        if command == "evaluate":
            same = run(command, trained[0], *rest, "--test_crop=0.5")
            assert same.stdout == cropped.stdout


def test_class_names_must_be_as_many_as_classes(trained, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["one", "two"]')
    done = run("predict", trained[0], "a.png", f"--classes={names}")
    assert done.returncode == 1 and "a JSON list of 10 names" in done.stderr


def test_evaluate_refuses_other_classes(trained, tmp_path):
    data_dir = write_folder(
        tmp_path / "my photographs",
        "ab",
        ("train", "validation", "test"),
        count=32,
    )
    done = run("evaluate", trained[0], "image_folder", data_dir)
    assert done.returncode == 1
    assert "a model of 10 classes for the 2 of 'image_folder'" in done.stderr
    # The command that it prints works.
    *_, command = done.stderr.partition("keras-vmoe train ")
    done = run("train", *shlex.split(command), "--dry_run")
    assert "hidden_dim: 16" in done.stdout and "ViTMoE" in done.stdout


def test_evaluate_names_or_leaves_out_a_corrupt_image(trained, tmp_path):
    data_dir = write_folder(tmp_path, "abcdefghij")
    path = tmp_path / "test" / "c" / "0.jpg"
    path.write_bytes(path.read_bytes()[:150])
    done = run("evaluate", trained[0], "image_folder", data_dir)
    assert done.returncode == 1
    assert f"Received: {path}, which is corrupt" in done.stderr
    with pytest.warns(UserWarning, match="cannot be decoded"):
        # Bare, and not taken for the value of what stands behind it.
        done = run("evaluate", "--skip-corrupt", trained[0], "image_folder",
                   data_dir)  # fmt: skip
    assert done.returncode == 0 and "cross-entropy" in done.stdout
    assert "warning: the classes of 'image_folder' have" in done.stderr


def test_what_images_a_model_wants_is_the_models(tmp_path):
    """One value from training to serving, and to the next training."""
    run_dir, image = tmp_path / "run", tmp_path / "digit.png"
    wanted = data.Preprocessing((90, 80, 70), (50, 60, 70), 0.8, "bicubic")
    flags = ["--mean=[90,80,70]", "--std=[50,60,70]", "--test_crop=0.8"]
    flags += ["--interpolation=bicubic", "--epochs=1", "--warmup=0"]
    done = run("train", *SMALL, *flags, "--run_dir", run_dir)
    assert done.returncode == 0, done.stderr
    model = models.load(run_dir / "model.keras")
    assert model.preprocessing == wanted
    accuracy = re.search(r"test accuracy: ([\d.]+)", done.stdout)[1]
    done = run("evaluate", run_dir)
    assert f"\naccuracy: {accuracy}" in done.stdout
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 3))
    keras.utils.save_img(image, noise, scale=False)
    done = run("predict", run_dir, image, "--top", 1)
    pixels = data.read_images(image, 8, preprocessing=wanted)
    chances = keras.ops.softmax(model.predict(pixels, verbose=0))
    assert f" {float(keras.ops.max(chances)):.3f}\n" in done.stdout
    again = ["train", *SMALL, "--init", run_dir, "--run_dir", tmp_path / "b"]
    done = run(*again, "--std=64", "--dry_run")
    assert "mean:\n  - 90" in done.stdout and "std: 64" in done.stdout
    assert "test_crop: 0.8" in done.stdout and "bicubic" in done.stdout
    for flag, words in (
        ("--std=0", "`std` must be numbers from 1 on"),
        ("--mean=[1,2]", "mean=(1.0, 2.0) for images of 3 channels"),
    ):
        done = run(*again, flag)
        assert done.returncode == 1 and words in done.stderr


def test_four_channels_from_training_to_prediction(tmp_path):
    generator, folder = np.random.default_rng(0), tmp_path / "images"
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        for i in range(2 * count):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (8, 8, 4), "uint8")
            PIL.Image.fromarray(pixels).save(path)
    run_dir = tmp_path / "run"
    sizes = [x for x in SMALL if "split" not in x and "batch" not in x]
    reads = ["--dataset=image_folder", f"--data_dir={folder}", "--batch_size=4"]
    for channels in (1, 4):
        done = run(
            "train", *sizes, *reads, f"--channels={channels}",
            "--run_dir", run_dir / str(channels),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        model = models.load(run_dir / str(channels) / "model.keras")
        assert model.input_shape[-1] == channels
        assert run("evaluate", run_dir / str(channels)).returncode == 0
        done = run("predict", run_dir / str(channels), path)
        assert done.returncode == 0, done.stderr

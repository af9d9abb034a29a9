"""The command as users type it: helpers of its tests."""

import contextlib
import io
import itertools
import json
import os
import pty
import re
from types import SimpleNamespace

import keras
import numpy as np

from keras_vmoe import cli
from tests import processes

SMALL = [
    "--train_split=train[:128]",
    "--validation_split=validation[:32]",
    "--test_split=test[:32]",
    "--epochs=2",
    "--warmup=0.5",
    "--batch_size=32",
    "--augmentation.crop_padding=0",
    "--model.image_size=8",
    "--model.patch_size=4",
    "--model.hidden_dim=16",
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--model.mlp_dim=32",
    "--moe.layers=every_1",
    "--moe.num_experts=4",
]


def run(*arguments):
    """The command in this process, which has already paid for the imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(
        returncode=code, stdout=out.getvalue(), stderr=err.getvalue()
    )


def write_folder(folder, classes, splits=("test",), count=1):
    for split, name, i in itertools.product(splits, classes, range(count)):
        path = folder / split / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(path, np.full((12, 12, 3), i), scale=False)
    return f"--data_dir={folder}"


def in_a_terminal(*commands):
    """What each of some commands prints where a person looks.

    Returns:
        List of strings; each ends with the exit status of its command.
    """
    script = (
        "import json, sys; from keras_vmoe import cli\n"
        "for x in json.loads(sys.argv[1]): print(cli.main(x), end='\\f')"
    )
    texts = [[str(x) for x in command] for command in commands]
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        process = processes.Process(
            "-c", script, json.dumps(texts), output=terminal
        )
    output = b""
    with contextlib.suppress(OSError):  # Linux's word for the end.
        while block := os.read(ours, 4096):
            output += block
    os.close(ours)
    process.wait()
    return re.sub(r"\x1b\[\d+m", "", output.decode()).split("\f")[:-1]

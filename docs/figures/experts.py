"""The pictures of docs/inspection.md, of a run on the embedded digits.

keras-vmoe train --run_dir runs/digits
python docs/figures/experts.py runs/digits
"""

import pathlib
import sys

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import training
from keras_vmoe.inspection import pictures

FOLDER = pathlib.Path(__file__).parent


def main(run_dir):
    """Draws three pictures beside this file."""
    model = training.restore(run_dir)
    test = data.load(
        "digits", "test", model.input_shape[1:3], 64, training=False,
        preprocessing=model.preprocessing,
    )  # fmt: skip
    found = inspection.inspect(model, test, num_examples=5)
    first, last = found.layers.values()
    figures = {
        "expert_maps": pictures.expert_maps(found),
        "best_patches": pictures.best_patches(first, found.class_names),
        "classes": pictures.class_heatmap(last, found.class_names),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])

"""The pictures of docs/inspection.md, of runs on digits and on CIFAR-10.

keras-vmoe train --run_dir runs/digits
keras-vmoe train --recipe cifar10_small --data_dir DIR --run_dir runs/cifar10
keras-vmoe train --recipe cifar10_small --data_dir DIR --patch_size 4 \
  --num_layers 4 --run_dir runs/patches
python docs/figures/experts.py runs/digits digits "" expert_maps classes
python docs/figures/experts.py runs/cifar10 cifar10 DIR best_patches dropped
python docs/figures/experts.py runs/patches cifar10 DIR expert_maps
"""

import pathlib
import sys

from PIL import Image

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import training
from keras_vmoe.inspection import pictures

FOLDER = pathlib.Path(__file__).parent


def main(run_dir, dataset, data_dir, *kept):
    """Draws pictures beside this file."""
    model = training.restore(run_dir)
    test = data.load(
        dataset, "test", model.input_shape[1:3], 64, training=False,
        data_dir=data_dir or None, preprocessing=model.preprocessing,
    )  # fmt: skip
    names = data.info(dataset, data_dir or None).class_names
    found = inspection.inspect(
        model, test, max_images=2000, class_names=names, num_examples=5
    )
    *_, last = found.layers.values()
    figures = {
        "expert_maps": pictures.expert_maps(found),
        "best_patches": pictures.best_patches(last, names),
        "dropped": pictures.drop_maps(found, last.name),
        "classes": pictures.class_heatmap(last, names),
    }
    for name in kept:
        path = FOLDER / f"{dataset}_{name}.png"
        figures[name].savefig(path, dpi=80)
        Image.open(path).convert("RGB").quantize().save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

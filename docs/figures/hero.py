"""The picture of the landing page and of README: images over their experts.

keras-vmoe train --recipe cifar10_small --data_dir DIR --patch_size 4 \
  --num_layers 4 --run_dir runs/patches
python docs/figures/hero.py runs/patches DIR
"""

import pathlib
import sys

import numpy as np
from PIL import Image

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import training
from keras_vmoe.inspection import pictures

COUNT, SIZE, GAP = 8, 128, 8  # Images, and pixels; no text, for both themes.


def main(run_dir, data_dir):
    """Draws the picture beside this file."""
    model = training.restore(run_dir)
    test = data.load(
        "cifar10", "test", model.input_shape[1:3], 64, training=False,
        data_dir=data_dir, preprocessing=model.preprocessing,
    )  # fmt: skip
    found = inspection.inspect(model, test, max_images=64, num_examples=COUNT)
    *_, last = found.layers.values()
    palette = 255 * pictures.colors(last.num_experts)
    step = SIZE + GAP
    drawn = Image.new("RGBA", (COUNT * step - GAP, 2 * step - GAP))
    for column in range(COUNT):
        image = Image.fromarray(np.uint8(found.images[column]))
        cells = Image.fromarray(np.uint8(palette[last.examples[column]]))
        sizes = (SIZE, SIZE)
        image = image.resize(sizes, Image.Resampling.BICUBIC).convert("RGB")
        cells = cells.resize(sizes, Image.Resampling.NEAREST)
        drawn.paste(image, (column * step, 0))
        gray = image.convert("L").convert("RGB")
        drawn.paste(Image.blend(gray, cells, 0.65), (column * step, step))
    path = pathlib.Path(__file__).with_name("hero.png")
    drawn.quantize().save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

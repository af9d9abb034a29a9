"""Pictures of every augmentation, on two photographs that come with sklearn.

python examples/augmentations.py docs/augmentations.jpg
"""

import argparse

import matplotlib
import numpy as np
import tensorflow as tf
from sklearn import datasets

from keras_vmoe import data
from keras_vmoe.data.augmentation import make_change
from keras_vmoe.data.augmentation import make_mix
from keras_vmoe.training import recipes

matplotlib.use("Agg")
from matplotlib import pyplot

SIZE, COPIES = 128, 4
ROWS = {
    "as it is": {},
    "flip": {"flip": True},
    "rand_augment\n0.9, 2 layers": {"rand_augment": 0.9},
    "three_augment": {"three_augment": True},
    "color_jitter\n0.3": {"color_jitter": 0.3},
    "erasing\n1.0": {"erasing": 1.0},
    "mixup\n0.8": {"mixup": 0.8},
    "cutmix\n1.0": {"cutmix": 1.0},
}


def main():
    """Draws one row per augmentation and one per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="Picture to write.")
    output = parser.parse_args().output
    settings = {name: data.Augmentation(**x) for name, x in ROWS.items()}
    for preset in ("vit_s16", "convnext_t"):
        family = preset.partition("_")[0]
        recipe = recipes.load(
            f"sweet_spot_{family}_in1k", model={"preset": preset}
        )
        settings[f"recipe\n{family}_in1k"] = recipe.data.augmentation
    images, labels = photographs()
    figure, axes = pyplot.subplots(
        len(settings), 2 * COPIES, figsize=(12, 1.6 * len(settings))
    )
    for row, (name, augmentation) in zip(axes, settings.items(), strict=True):
        changed, mixed = augment(augmentation, images, labels)
        for axis, image, label in zip(row, changed, mixed, strict=True):
            axis.imshow(image.astype("uint8"))
            axis.set_xticks([])
            axis.set_yticks([])
            if augmentation.mixes:
                axis.set_xlabel(f"{label[0]:.0%} pagoda", fontsize=7)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(output, dpi=80, pil_kwargs={"quality": 40})
    print(f"{output}: {len(settings)} rows")


def photographs():
    """Copies of both photographs, side by side, and one-hot labels."""
    pair = [
        tf.image.resize(photograph[:, 100:527], (SIZE, SIZE), antialias=True)
        for photograph in datasets.load_sample_images().images
    ]
    images = np.stack(pair * COPIES)
    return images, np.eye(2, dtype="float32")[np.arange(len(images)) % 2]


def augment(augmentation, images, labels):
    """One batch, changed by the draws of a fixed seed."""
    change, mix = make_change(augmentation), make_mix(augmentation)
    if change is not None:
        seeds = (tf.constant([i, 3], tf.int64) for i in range(len(images)))
        changed = map(change, tf.constant(images), seeds)
        images = np.stack([image.numpy() for image in changed])
    if mix is not None:
        images, labels = (x.numpy() for x in mix(images, labels, [0, 3]))
    return images, labels


if __name__ == "__main__":
    main()

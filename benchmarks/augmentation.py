"""Images per second of the training pipeline at 224, and what each stage costs.

    KERAS_BACKEND=jax python benchmarks/augmentation.py --save

Table `pipeline`: from JPEG files of 500 x 375, drawn at random and as large as
photographs, to batches of 64 for a model: decoding alone, with one stage of
augmentation each, and the papers' whole recipes.

Table `stage`: one stage on decoded batches, ours, image by image, that of
`keras.layers`, and that of the TensorFlow Model Garden where it is installed
(`pip install tf-models-official`).

Every measurement reads all images once, the candidates in turn; images per
second are of the median, with the quartiles. CPU milliseconds are those of all
cores together for one image: what a stage costs, also on a machine in use.
"""

import argparse
import importlib.util
import pathlib
import tempfile
import time

import interleaved
import keras
import keras_cv
import numpy as np
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe.data.augmentation import make_change
from keras_vmoe.data.augmentation import make_mix
from keras_vmoe.training import recipes

RESULTS = pathlib.Path(__file__).parent / "results" / "augmentation.csv"
SIZE, BATCH, IMAGES, CLASSES = 224, 64, 1024, 10
CONVNEXT, VIT = (
    recipes.load(name, model={"preset": preset}).data.augmentation
    for name, preset in (
        ("sweet_spot_convnext_in1k", "convnext_t"),
        ("sweet_spot_vit_in1k", "vit_s16"),
    )
)
STAGES = {
    "flip": {"flip": True},
    "RandAugment": {
        "rand_augment": CONVNEXT.rand_augment,
        "rand_augment_layers": CONVNEXT.rand_augment_layers,
    },
    "3-Augment": {"three_augment": True},
    "color jitter": {"color_jitter": VIT.color_jitter},
    "erasing": {"erasing": CONVNEXT.erasing},
    "MixUp": {"mixup": CONVNEXT.mixup},
    "CutMix": {"cutmix": CONVNEXT.cutmix},
}
TARGETS = {"ConvNeXt's recipe": 350, "ViT's recipe": 500}


def main():
    """Measures both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(pathlib.Path(folder))
        tables = {"pipeline": pipelines(folder), "stage": stages()}
        rows = []
        for table, candidates in tables.items():
            spent = {name: [] for name in candidates}
            passes = {
                name: reader(x, spent[name]) for name, x in candidates.items()
            }
            seconds = interleaved.measure(passes, arguments.rounds, warmup=1)
            rows += [
                row(table, name, x, spent[name][1:])
                for name, x in seconds.items()
            ]
            print(f"\n| {table} | images/s | quartiles | CPU ms | target |")
            print("|---|---|---|---|---|")
            for line in rows[-len(seconds) :]:
                print(
                    f"| {line['candidate']} | {line['images_per_s']} | "
                    f"{line['q25']} to {line['q75']} | {line['cpu_ms']} | "
                    f"{line['target']} |"
                )
    if arguments.save:
        interleaved.write(RESULTS, rows)


def write_photographs(folder):
    """JPEGs with coarse and fine structure, of about 100 kB each."""
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        coarse = generator.uniform(0, 255, (8, 6, 3))
        image = tf.image.resize(coarse, (375, 500), "bicubic").numpy()
        image += generator.normal(0, 12, image.shape)
        pixels = np.clip(image, 0, 255).astype("uint8")
        path = folder / "train" / f"{i % CLASSES}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(pixels, quality=90).numpy())
    size = np.mean([path.stat().st_size for path in folder.rglob("*.jpg")])
    print(f"{IMAGES} JPEGs of {size / 1e3:.0f} kB on the average")


def pipelines(folder):
    """Datasets from files."""
    settings = {
        "decoding": {},
        "decoding a random window": {"crop_area": (0.08, 1.0)},
        **{f"decoding, {name}": x for name, x in STAGES.items()},
    }
    augmentations = {
        name: data.Augmentation(**x) for name, x in settings.items()
    }
    augmentations |= {"ConvNeXt's recipe": CONVNEXT, "ViT's recipe": VIT}
    # What is put in the place of ours, RandAugment of ConvNeXt's magnitude.
    cv, kl = keras_cv.layers, keras.layers
    cv_options = {"value_range": (0, 255), "augmentations_per_image": 2}
    for name, layer in {
        "flip, keras.layers": kl.RandomFlip("horizontal"),
        "RandAugment, keras.layers": kl.RandAugment(num_ops=2, factor=0.9),
        "MixUp, keras.layers": kl.MixUp(0.8),
        "CutMix, keras.layers": kl.CutMix(1.0),
        "flip, Keras-CV": cv.RandomFlip("horizontal"),
        "RandAugment, Keras-CV": cv.RandAugment(magnitude=0.9, **cv_options),
        "MixUp, Keras-CV": cv.MixUp(0.8),
        "CutMix, Keras-CV": cv.CutMix(1.0),
    }.items():
        augmentations[f"decoding, {name}"] = layer
    return {
        name: data.load(
            "image_folder", "train", SIZE, BATCH, True, folder,
            augmentation=x, one_hot=True,
        )
        for name, x in augmentations.items()
    }  # fmt: skip


def applied(augmentation, images, labels, number):
    """A batch, each image changed or all of them mixed."""
    seed = tf.stack([number, 0])
    mix = make_mix(augmentation)
    if mix is not None:
        return mix(images, labels, seed)
    change = make_change(augmentation)
    images = tf.map_fn(
        lambda x: change(*x),
        (images, tf.random.split(seed, BATCH)),
        fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint8),
    )
    return images, labels


def stages():
    """Datasets from decoded batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3))
    labels = np.eye(CLASSES, dtype="float32")[np.arange(BATCH) % CLASSES]
    batch = (tf.constant(pixels, tf.uint8), tf.constant(labels))
    batches = tf.data.Dataset.from_tensors(batch).repeat(IMAGES // BATCH)
    numbers = tf.data.Dataset.range(IMAGES // BATCH)
    candidates = {}
    for name, settings in STAGES.items():
        augmentation = data.Augmentation(**settings)
        candidates[name] = tf.data.Dataset.zip(batches, numbers).map(
            lambda batch, number, x=augmentation: applied(x, *batch, number),
            tf.data.AUTOTUNE,
        )
    for name, change in others().items():
        candidates[name] = batches.map(change, tf.data.AUTOTUNE)
    return candidates


def others():
    """The same stages of other libraries."""
    magnitude = CONVNEXT.rand_augment
    layers = {
        "RandAugment": keras.layers.RandAugment(
            (0, 255), CONVNEXT.rand_augment_layers, magnitude
        ),
        "color jitter": keras.layers.RandomColorJitter(
            (0, 255), *[VIT.color_jitter] * 3
        ),
        "erasing": keras.layers.RandomErasing(CONVNEXT.erasing),
        "flip": keras.layers.RandomFlip("horizontal"),
    }
    changes = {
        f"{name}, keras.layers": lambda x, y, layer=layer: (
            layer(tf.cast(x, tf.float32), training=True),
            y,
        )
        for name, layer in layers.items()
    }
    mixers = {
        "MixUp": keras.layers.MixUp(CONVNEXT.mixup),
        "CutMix": keras.layers.CutMix(CONVNEXT.cutmix),
    }
    changes |= {
        f"{name}, keras.layers": lambda x, y, layer=layer: layer(
            {"images": tf.cast(x, tf.float32), "labels": y}, training=True
        )
        for name, layer in mixers.items()
    }
    if importlib.util.find_spec("official"):
        from official.vision.ops import augment

        garden = augment.RandAugment(
            CONVNEXT.rand_augment_layers, 10 * magnitude
        )
        erasing = augment.RandomErasing(CONVNEXT.erasing)
        changes["RandAugment, Model Garden"] = lambda x, y: (
            tf.map_fn(garden.distort, x),
            y,
        )
        changes["erasing, Model Garden"] = lambda x, y: (
            tf.map_fn(erasing.distort, tf.cast(x, tf.float32)),
            y,
        )
    return changes


def reader(dataset, spent):
    """A function that reads a dataset once, and notes the CPU's seconds."""

    def read():
        start = time.process_time()
        for _ in dataset:
            pass
        spent.append(time.process_time() - start)

    return read


def row(table, name, seconds, spent):
    """One row of the results."""
    low, middle, high = np.percentile(IMAGES / seconds, [25, 50, 75])
    return {
        **interleaved.versions("tensorflow"),
        "table": table,
        "candidate": name,
        "images_per_s": round(middle),
        "q25": round(low),
        "q75": round(high),
        "cpu_ms": round(1e3 * float(np.median(spent)) / IMAGES, 2),
        "target": TARGETS.get(name, ""),
    }


if __name__ == "__main__":
    main()

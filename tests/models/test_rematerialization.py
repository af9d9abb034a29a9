"""`remat=True`: the same training, with less kept for the gradient."""

import keras
import numpy as np
import pytest

from keras_vmoe import models
from tests.models.definitions import images_of
from tests.models.definitions import tiny

MOE = {"layers": "every_1", "num_experts": 4, "noise_std": 1.0}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
IMAGES, LABELS = images_of(6), np.arange(6) % 3


def vit(remat):
    # Whatever draws or is counted in training.
    return tiny(
        num_layers=2, moe=MOE, dropout=0.1, drop_path_rate=0.2, remat=remat
    )


def convnext(remat):
    return models.ConvNeXtMoE(
        depths=(1, 1), dims=(8, 16), num_classes=3, image_size=8,
        patch_size=2, moe=MOE, drop_path_rate=0.2, remat=remat,
    )  # fmt: skip


def fit(make, remat):
    """A model behind four steps, and the losses."""
    keras.utils.set_random_seed(0)
    model = make(remat)
    model.compile("sgd", LOSS)
    options = {"batch_size": 3, "epochs": 2, "shuffle": False, "verbose": 0}
    return model, model.fit(IMAGES, LABELS, **options).history["loss"]


def check(make):
    model, losses = fit(make, False)
    again, same = fit(make, True)
    np.testing.assert_allclose(same, losses, atol=1e-6)
    # Learned ones, seeds, and the statistics of the routing.
    for mine, theirs in zip(again.variables, model.variables, strict=True):
        mine, theirs = map(keras.ops.convert_to_numpy, (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    return again


def test_training_is_the_same(tmp_path):
    model = check(vit)
    models.save(model, tmp_path / "vit.keras")
    assert models.load(tmp_path / "vit.keras").remat is True


@pytest.mark.backends("torch")
def test_training_of_a_convnext_is_the_same():
    check(convnext)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("make", [vit, convnext])
def test_less_is_kept(make):
    """What PyTorch holds between the passes, beside weights."""
    import torch

    def kept(remat):
        model, found = make(remat), {}
        weights = {x.data_ptr() for x in model.parameters()}

        def pack(x):
            if x.data_ptr() not in weights:
                found[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(keras.ops.convert_to_tensor(images_of(32)), training=True)
        return sum(found.values())

    assert kept(True) < 0.3 * kept(False)


@pytest.mark.backends("torch")
def test_frozen_layers_stay():
    model = vit(True)
    model.get_layer("block_0_moe").trainable = False
    before = [keras.ops.copy(x) for x in model.get_layer("block_0_moe").weights]
    model.compile("sgd", LOSS)
    model.fit(IMAGES, LABELS, verbose=0)
    for old, new in zip(
        before, model.get_layer("block_0_moe").weights, strict=True
    ):
        np.testing.assert_array_equal(
            *map(keras.ops.convert_to_numpy, (old, new))
        )


@pytest.mark.backends("torch")
def test_an_unknown_value():
    with pytest.raises(ValueError, match="`remat` must be.*remat='full'"):
        vit("full")

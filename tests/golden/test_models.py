"""Whole tiny V-MoE models of the reference program, weights and all."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import evaluation
from keras_vmoe import losses
from keras_vmoe.checkpoints import load_vmoe
from keras_vmoe.models.placement import moe_blocks
from keras_vmoe.routing._groups import group_tokens
from tests.golden.models import NAMES
from tests.golden.models import build
from tests.golden.models import read
from tests.gradients import compiled


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    figures, weights, config = read(request.param)
    model = build(config)
    assert load_vmoe(model, weights) is model
    return types.SimpleNamespace(
        name=request.param, model=model, figures=figures, config=config
    )


def assert_close(got, expected):
    got = ops.convert_to_numpy(got)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.backends("tensorflow", "torch")
def test_logits_eager(golden):
    assert_close(
        golden.model(golden.figures["input"]), golden.figures["logits"]
    )


def test_logits_compiled(golden):
    logits = golden.model.predict(golden.figures["input"], verbose=0)
    assert_close(logits, golden.figures["logits"])


@pytest.mark.backends("torch")
def test_placement_by_name_is_theirs(golden):
    # Their configuration lists blocks; ours has a name for them.
    name = {"vit_last2_k2": "last_2", "vit_every2_k1_bpr": "every_2"}
    encoder = golden.config["encoder"]
    blocks = moe_blocks(name[golden.name], encoder["num_layers"])
    assert list(blocks) == encoder["moe"]["layers"]


@pytest.fixture(scope="module")
def parts(golden):
    """The tokens before each MoE layer, compiled."""
    model = golden.model
    blocks = golden.config["encoder"]["moe"]["layers"]
    tokens = [model.get_layer(f"block_{i}_mlp_norm").output for i in blocks]
    taps = keras.Model(model.input, tokens)
    tokens = taps.predict(golden.figures["input"], verbose=0)
    return dict(zip(blocks, tokens, strict=True))


def test_features_and_what_few_shot_evaluation_makes_of_them(golden):
    images, theirs = golden.figures["input"], golden.figures["features"]
    labels = np.arange(len(images)) % 2
    ours, _ = evaluation.extract_features(golden.model, [(images, labels)])
    assert_close(ours, theirs)
    found, expected = (
        evaluation.few_shot((x, labels), (x, labels), shots=(1, 2)).accuracy
        for x in (ours, theirs)
    )
    np.testing.assert_array_equal(found, expected)


def test_losses_of_each_layer(golden, parts):
    for block, tokens in parts.items():
        layer = golden.model.get_layer(f"block_{block}_moe")

        def both(tokens, layer=layer):
            groups = group_tokens(tokens, layer.images_per_group)
            gates = ops.softmax(layer.router.gate_layer(groups.tokens))
            return losses.importance_loss(gates), losses.gshard_loss(gates)

        importance, gshard = map(ops.convert_to_numpy, compiled(both)(tokens))
        prefix = f"metrics/encoderblock_{block}"
        figures = golden.figures
        np.testing.assert_allclose(
            importance, figures[f"{prefix}/importance_loss"], rtol=1e-5
        )
        np.testing.assert_allclose(
            gshard, figures[f"{prefix}/gshard_loss"], rtol=1e-5
        )


def test_auxiliary_loss_in_training(golden):
    # Their figure is one sum per group, ours its mean over the groups. Without
    # noise there is no load loss.
    model = golden.model

    def step(images):
        logits = model(images, training=True)
        return logits, sum(model.losses)

    logits, total = compiled(step, model)(golden.figures["input"])
    expected = golden.figures["metrics/auxiliary_loss"].mean()
    total = float(ops.convert_to_numpy(total))
    assert total == pytest.approx(expected, rel=1e-5)
    # Without noise and dropout, training changes nothing else.
    assert_close(logits, golden.figures["logits"])
    for layer in model.moe_layers:
        block = layer.name.split("_")[1]
        loss = golden.figures[f"metrics/encoderblock_{block}/auxiliary_loss"]
        reported = layer.router.statistics.result()["auxiliary_loss"]
        assert reported == pytest.approx(loss.mean(), rel=1e-5)

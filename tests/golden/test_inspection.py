"""What experts do in 24 images, against figures that plain loops computed."""

import json
import pathlib

import numpy as np
import pytest
from keras import ops

from keras_vmoe import inspection
from keras_vmoe import routing

FOLDER = pathlib.Path(__file__).parent
GOLDEN = dict(np.load(FOLDER / "inspection.npz"))
CONFIG = json.loads((FOLDER / "inspection.json").read_text())
E = CONFIG["num_experts"]
GRID = CONFIG["rows"], CONFIG["columns"]


@pytest.fixture(scope="module")
def top():
    """All choices, from a plan in which there is room for all."""
    num_patches = GOLDEN["gates"].shape[1]
    gates = ops.convert_to_tensor(GOLDEN["gates"])
    num_selected = CONFIG["num_selected_experts"]
    plan = routing.top_k_plan(gates, num_selected, num_patches)
    return inspection.top_experts(plan)


def test_choices(top):
    np.testing.assert_array_equal(top[..., 0], GOLDEN["top_expert"])
    plan = routing.dropless_plan(ops.convert_to_tensor(GOLDEN["gates"]), 2)
    np.testing.assert_array_equal(inspection.top_experts(plan), top)


@pytest.mark.backends("torch")
def test_numbers(top):
    first, labels = top[..., 0], GOLDEN["labels"]
    counts = inspection.patch_counts(first, E)
    num_classes, num_patches = CONFIG["num_classes"], first.shape[1]
    exact = {
        "counts": counts,
        "class_counts": inspection.class_counts(counts, labels, num_classes),
        "experts_per_image": inspection.experts_per_image(counts),
        "experts_per_image_all_choices": inspection.experts_per_image(
            inspection.patch_counts(top, E)
        ),
    }
    for name, value in exact.items():
        np.testing.assert_array_equal(value, GOLDEN[name], name)
    close = {
        "similarity": inspection.similarity(counts),
        "patches_cdf": inspection.patches_cdf(counts, num_patches),
        "spatial": inspection.spatial_share(first, E, GRID),
        "class_weight": inspection.class_weight(
            GOLDEN["gates"], top, labels, num_classes
        ),
        "load": counts.sum(axis=0) / counts.sum(),
    }
    for name, value in close.items():
        np.testing.assert_allclose(
            value, GOLDEN[name], rtol=0, atol=1e-12, err_msg=name
        )
    mean = exact["experts_per_image"].mean()
    assert mean == pytest.approx(CONFIG["mean_experts_per_image"])

"""`inspect` against the plain functions on everything at once."""

import math
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe.inspection import _drawing
from keras_vmoe.inspection import decisions
from keras_vmoe.inspection import pictures
from keras_vmoe.inspection import report
from tests.commands import run
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

LABELS = np.arange(10) % 3
ROUTERS = {
    "top_k": {"num_selected_experts": 2, "capacity_factor": 0.5},
    "dropless": {"capacity_factor": "dropless"},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "soft": {"router": "soft", "images_per_group": None, "num_slots": 2},
}


def model_of(router):
    return randomize(tiny(moe={"images_per_group": 2, **ROUTERS[router]}))


def batches(labels=True, sizes=(6, 4)):
    images, start, found = images_of(10), 0, []
    for size in sizes:
        part = slice(start, start + size)
        pair = (images[part], LABELS[part])
        found.append(pair if labels else images[part])
        start += size
    return found


def tokens_of(model, name, images):
    layer = model.get_layer(name)
    probe = keras.Model(model.input, layer.input)
    return layer, probe.predict(images, verbose=0)


@pytest.mark.parametrize("router", first_everywhere(ROUTERS))
@pytest.mark.backends("jax", "torch")
def test_every_number(router):
    model = model_of(router)
    found = inspection.inspect(model, batches())
    assert list(found.layers) == ["block_1_moe", "block_3_moe"]
    for name, seen in found.layers.items():
        layer, tokens = tokens_of(model, name, images_of(10))
        decided = decisions.decide(layer, tokens)
        top = decided.top[:, 1:]  # Without the class token.
        first = top[..., 0]
        counts = inspection.patch_counts(first, 4)
        expected = {
            "load": counts.sum(axis=0) / counts.sum(),
            "experts_per_image": np.bincount(
                inspection.experts_per_image(counts), minlength=5
            ),
            "similarity": inspection.similarity(counts),
            "class_counts": inspection.class_counts(counts, LABELS, 10),
            "class_weight": inspection.class_weight(
                decided.gates[:, 1:], top, LABELS, 10
            ),
            "patches_cdf": inspection.patches_cdf(counts, 4),
            "spatial_share": inspection.spatial_share(first, 4),
            "extra_tokens": np.bincount(
                decided.top[:, 0, 0][decided.top[:, 0, 0] >= 0], minlength=4
            ),
            "examples": first[:8].reshape(-1, 2, 2),
            "priority": decided.gates[:8, 1:].max(-1).reshape(-1, 2, 2),
        }
        every = inspection.patch_counts(top, 4)
        expected["load_of_all_choices"] = every.sum(axis=0) / every.sum()
        expected["experts_per_image_of_all_choices"] = np.bincount(
            inspection.experts_per_image(every), minlength=5
        )
        if decided.taken is None:
            assert seen.taken is None and router in ("top_k", "dropless")
        else:
            taken = decided.taken[:8, 1:].swapaxes(1, 2)
            expected["taken"] = taken.reshape(-1, 4, 2, 2)
        for key, value in expected.items():
            np.testing.assert_allclose(
                getattr(seen, key), value, atol=1e-6, err_msg=f"{name}/{key}"
            )
        assert seen.served_share == decided.served[:, 1:].mean()
        gates = decided.gates[:, 1:].astype("float64")
        entropy = -(gates * np.log(gates)).sum(-1).mean()
        assert seen.entropy == pytest.approx(entropy, rel=1e-4)
        assert bool(seen.served) == (router in ("top_k", "dropless"))
    table = found.between["block_1_moe", "block_3_moe"]
    choices = []
    for name in found.layers:
        layer, tokens = tokens_of(model, name, images_of(10))
        choices.append(decisions.decide(layer, tokens).top[:, 1:, 0])
    pairs = np.zeros((4, 4))
    for a, b in zip(*(x.ravel() for x in choices), strict=True):
        if a >= 0 and b >= 0:
            pairs[a, b] += 1
    np.testing.assert_array_equal(table, pairs)
    np.testing.assert_array_equal(found.labels, LABELS[:8])
    assert found.class_names == tuple("0123456789")


@pytest.mark.backends("jax", "torch")
def test_what_routers_decide():
    """Token choice by the gates alone, expert choice by its plan."""
    for router in ROUTERS:
        model = model_of(router)
        layer, tokens = tokens_of(model, "block_3_moe", images_of(4))
        decided = decisions.decide(layer, tokens)
        np.testing.assert_allclose(decided.gates.sum(-1), 1, atol=1e-5)
        best = decided.gates.argmax(axis=-1)
        if router in ("top_k", "dropless", "soft"):
            np.testing.assert_array_equal(decided.top[..., 0], best)
        if router == "soft":
            plan = layer.plan(ops.convert_to_tensor(tokens))
            weight = ops.convert_to_numpy(plan.dispatch_weight).sum(axis=-1)
            np.testing.assert_allclose(decided.taken, weight, atol=1e-6)
            np.testing.assert_allclose(  # Two slots, each of all tokens.
                decided.taken.sum(axis=1), 2, atol=1e-5
            )
        if router == "expert_choice":
            plan = layer.plan(ops.convert_to_tensor(tokens))
            chosen = ops.convert_to_numpy(plan.token)  # (2, 4, C) of 10.
            for e in range(4):
                has = (decided.top == e).any(axis=-1).reshape(2, 10)
                for group in range(2):
                    expected = np.zeros(11, bool)
                    expected[chosen[group, e]] = True
                    np.testing.assert_array_equal(has[group], expected[:10])
                gates, taken = (
                    x[..., e].reshape(2, 10)
                    for x in (decided.gates, decided.taken)
                )
                np.testing.assert_array_equal(taken, np.where(has, gates, 0))
            number = (decided.top >= 0).sum(axis=-1)
            np.testing.assert_array_equal(decided.served, number > 0)
        if router in ("dropless", "soft"):
            assert decided.served.all()


def served_slowly(gates, num_selected, places, priority):
    """Which tokens are served: all first choices before all second ones."""
    order = np.arange(len(gates))
    if priority:
        order = np.argsort(-gates.max(axis=-1), kind="stable")
    ranked = np.argsort(-gates, axis=-1, kind="stable")
    taken = np.zeros(gates.shape[-1], int)
    served = np.zeros(len(gates), bool)
    for k in range(num_selected):
        for token in order:
            expert = ranked[token, k]
            if taken[expert] < places:
                taken[expert] += 1
                served[token] = True
    return served


@pytest.mark.backends("torch")
def test_drop_maps_are_those_of_a_slow_loop():
    model = randomize(
        tiny(
            image_size=16,
            moe={"images_per_group": 2, "num_selected_experts": 1},
        )
    )
    images = images_of(4).repeat(2, axis=1).repeat(2, axis=2)
    found = inspection.inspect(model, [(images, LABELS[:4])])
    for name, seen in found.layers.items():
        layer, tokens = tokens_of(model, name, images)
        gates = decisions.decide(layer, tokens).gates
        for (capacity, priority), served in seen.served.items():
            # 34 tokens of two images, 4 experts, in multiples of 4.
            places = 4 * math.ceil(math.ceil(34 * capacity / 4) / 4)
            expected = np.concatenate(
                [
                    served_slowly(
                        gates[i : i + 2].reshape(34, 4), 1, places, priority
                    )
                    for i in (0, 2)
                ]
            ).reshape(4, 17)[:, 1:]
            np.testing.assert_array_equal(served.reshape(4, 16), expected)
    assert not seen.served[0.25, False].all()


@pytest.mark.backends("torch")
def test_the_best_patches_are_cut_from_their_images():
    model = model_of("top_k")
    images = images_of(10)
    found = inspection.inspect(model, batches(), layers=["block_3_moe"])
    (seen,) = found.layers.values()
    layer, tokens = tokens_of(model, "block_3_moe", images)
    decided = decisions.decide(layer, tokens)
    gates, first = decided.gates[:, 1:], decided.top[:, 1:, 0]
    pixels = np.clip(np.round(images * 127.5 + 127.5), 0, 255)
    for e in range(4):
        mine = np.where(first == e, gates[..., e], 0)
        order = np.argsort(-mine.max(axis=1), kind="stable")
        order = [i for i in order if mine[i].max() > 0]
        assert list(seen.best_images[e][: len(order)]) == order
        assert (seen.best_images[e][len(order) :] == -1).all()
        assert list(seen.best_labels[e][: len(order)]) == list(LABELS[order])
        for slot, i in enumerate(order):
            row, column = divmod(int(mine[i].argmax()), 2)
            patch = pixels[i, 4 * row : 4 * row + 4, 4 * column :][:, :4]
            np.testing.assert_array_equal(seen.best_patches[e, slot], patch)


@pytest.mark.backends("torch")
def test_images_without_labels_and_some_of_them():
    model = model_of("top_k")
    found = inspection.inspect(
        model, batches(labels=False), max_images=7, num_examples=3
    )
    layer = found.layers["block_1_moe"]
    assert layer.num_images == 7 and len(found.images) == 3
    assert layer.class_counts is None and found.class_names is None
    whole = inspection.inspect(model, batches(sizes=(6, 1)))
    np.testing.assert_array_equal(layer.load, whole.layers["block_1_moe"].load)
    assert not any("class" in x for x in found.sentences()["block_1_moe"])


@pytest.mark.backends("torch")
def test_a_convnext_and_a_model_of_ones_own():
    model = randomize(
        models.ConvNeXtMoE(
            (1, 1), (8, 16), 10, image_size=32, patch_size=4,
            moe={"layers": [0, 1], "num_experts": 4},
        )
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    found = inspection.inspect(model, [(images.astype("f4"), LABELS[:4])])
    grids = [layer.grid for layer in found.layers.values()]
    assert grids == [(8, 8), (4, 4)] and not found.between
    clone = keras.Model(model.input, model.output)
    again = inspection.inspect(clone, [(images.astype("f4"), LABELS[:4])])
    np.testing.assert_array_equal(
        again.layers["block_1_moe"].load, found.layers["block_1_moe"].load
    )


@pytest.mark.backends("torch")
def test_what_cannot_be_looked_at():
    with pytest.raises(ValueError, match="`models.upcycle` turns MLPs of a"):
        inspection.inspect(tiny(moe=None), batches())
    words = "Received: 'block_2_moe'. Did you mean 'block_[13]_moe'"
    with pytest.raises(ValueError, match=words):
        inspection.inspect(tiny(), batches(), layers=["block_2_moe"])
    with pytest.raises(ValueError, match="an empty dataset"):
        inspection.inspect(tiny(), [])
    model = tiny(preprocessing=data.Preprocessing.imagenet())
    wrong = data.load("digits", "test[:8]", 8, 8, training=False)
    with pytest.raises(ValueError, match="Pass `preprocessing=model"):
        inspection.inspect(model, wrong)


@pytest.mark.backends("torch")
def test_a_plan_in_which_no_token_chooses():
    layer = model_of("soft").get_layer("block_1_moe")
    plan = layer.plan(ops.ones((1, 5, 32)))
    with pytest.raises(TypeError, match="Received: a SoftPlan"):
        inspection.top_experts(plan)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_the_report(router, tmp_path):
    model = model_of(router)
    found = inspection.inspect(model, batches())
    page = found.save(tmp_path / "report")
    names = {"index.html", "layers.csv", "experts.csv", "classes.csv",
             "numbers.npz"}  # fmt: skip
    assert {x.name for x in page.parent.iterdir()} == names
    text = page.read_text()
    assert "http" not in re.sub(r"base64,[^\"]*", "", text), "no network"
    assert text.count("data:image/png;base64,") >= 13
    for name in found.layers:
        for sentence in found.sentences()[name]:
            assert sentence.replace("'", "&#39;") in text
    with np.load(page.parent / "numbers.npz") as numbers:
        for key in ("load", "similarity", "class_counts", "examples",
                    "entropy", "served_share"):  # fmt: skip
            value = getattr(found.layers["block_3_moe"], key)
            np.testing.assert_array_equal(numbers[f"block_3_moe/{key}"], value)
    rows = (page.parent / "classes.csv").read_text().split("\n")
    assert len(rows) == 2 + 2 * 10 * 4


@pytest.mark.backends("torch")
def test_a_report_takes_the_place_of_the_one_before(tmp_path):
    """Of which nothing is left."""
    model = model_of("top_k")
    found = inspection.inspect(model, batches(), num_examples=1)
    page = found.save(tmp_path / "report")
    names = {x.name for x in page.parent.iterdir()}
    few = inspection.inspect(model, batches(labels=False), num_examples=1)
    few.save(tmp_path / "report", title="<some> images")
    assert "&lt;some&gt; images" in page.read_text()
    assert {x.name for x in page.parent.iterdir()} == names - {"classes.csv"}
    (tmp_path / "report" / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"which holds .'mine.txt'."):
        found.save(tmp_path / "report")
    with pytest.raises(FileExistsError, match="which is a file"):
        found.save(tmp_path / "report" / "mine.txt")


@pytest.mark.backends("torch")
def test_pictures_of_what_is_not_there():
    found = inspection.inspect(model_of("top_k"), batches(labels=False))
    with pytest.raises(ValueError, match="Received: name='block_1_moe'"):
        pictures.taken_maps(found, "block_1_moe")
    with pytest.raises(ValueError, match="Received: layer 'block_1_moe' with"):
        pictures.class_heatmap(found.layers["block_1_moe"], ["a"])


@pytest.mark.backends("torch")
def test_images_that_are_left_out_were_routed_with_the_others():
    moe = {**ROUTERS["expert_choice"], "images_per_group": 8}
    model = randomize(tiny(moe=moe))
    every = inspection.inspect(model, batches(sizes=(10,)))
    few = inspection.inspect(model, batches(sizes=(10,)), max_images=3)
    for name, layer in few.layers.items():
        np.testing.assert_array_equal(
            layer.examples, every.layers[name].examples[:3]
        )
    for key in ("images", "labels"):
        np.testing.assert_array_equal(
            getattr(few, key), getattr(every, key)[:3]
        )


@pytest.mark.backends("torch")
def test_what_the_pictures_show():
    model = model_of("top_k")
    found = inspection.inspect(
        model, batches(), num_examples=2, image_names=["a.jpg", "$b$.jpg", "c"]
    )
    layer = found.layers["block_3_moe"]
    palette = pictures.colors(4)
    axes = np.array(pictures.expert_maps(found).axes).reshape(2, 3)
    assert axes[1, 0].get_ylabel() == r"\$b\$.jpg"
    for row, image in enumerate(found.images):
        shown = axes[row, 2].get_images()[0].get_array()
        gray = image.mean(axis=-1, keepdims=True) / 255
        colors = (shown - 0.4 * (0.35 + 0.65 * gray)) / 0.6
        places = np.array(layer.examples[row]).repeat(4, 0).repeat(4, 1)
        np.testing.assert_allclose(colors, palette[places], atol=1e-6)
    figure = pictures.drop_maps(found, layer.name)
    axes = np.array(figure.axes).reshape(2, 8)
    for axis, served in zip(axes[0, 2:], layer.served.values(), strict=True):
        assert f"{served.mean():.0%} served" in axis.get_title()
        shown = axis.get_images()[0].get_array()
        picture = found.images[0] / 255
        same = np.isclose(shown, picture).all(axis=-1)
        np.testing.assert_array_equal(same, served[0].repeat(4, 0).repeat(4, 1))
    left, right = pictures.class_heatmap(layer, found.class_names).axes[:2]
    counts = layer.class_counts[:3]
    share = left.get_images()[0].get_array()
    np.testing.assert_allclose(
        share[:3], counts / counts.sum(axis=1, keepdims=True)
    )
    assert np.isnan(np.asarray(share[3:].filled(np.nan))).all()
    last = [x.get_text() for x in right.get_yticklabels()][3:]
    assert set(last) == set("3456789")
    table = found.between["block_1_moe", "block_3_moe"]
    figure = pictures.between_layers(table, ("a", "b"))
    shown = figure.axes[0].get_images()[0].get_array()
    rows = np.maximum(table.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(shown, table / rows)


@pytest.mark.backends("torch")
def test_a_functional_model_keeps_its_class_token_apart():
    model = model_of("top_k")
    plain = keras.Model(model.input, model.output)
    found = inspection.inspect(plain, batches())
    layer = found.layers["block_3_moe"]
    assert layer.grid == (2, 2) and layer.extra_tokens.sum() == 10


@pytest.mark.backends("torch")
def test_a_history_of_another_model_is_left_out(tmp_path):
    found = inspection.inspect(model_of("top_k"), batches(), num_examples=0)
    names = [f"block_1_moe/load_{e}" for e in range(8)]
    path = tmp_path / "history.csv"
    path.write_text(",".join(names) + "\n" + ",".join(["0.1"] * 8) + "\n")
    page = found.save(tmp_path / "report", history=path)
    assert "during training" not in page.read_text()
    path.write_text(",".join(names[:4]) + "\n0.1,,0.2,0.3\n")
    with pytest.warns(UserWarning, match="history.csv is left out"):
        found.save(tmp_path / "report", history=path)


BAD_LABELS = [
    (np.eye(10)[LABELS], r"shape .6, 10."),
    (LABELS[:, None], r"shape .6, 1."),
    (LABELS.astype("float32"), "dtype float32"),
    (LABELS + 8, "from 0 to 9, .* Received: 10"),
    (LABELS - 1, "Received: -1"),
]


@pytest.mark.backends("torch")
@pytest.mark.parametrize(("labels", "words"), BAD_LABELS)
def test_labels_that_are_no_classes(labels, words):
    batch = images_of(10)[:6], labels[:6]
    with pytest.raises(ValueError, match=words):
        inspection.inspect(model_of("top_k"), [batch])


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_names": ["a"]}, "1 names for 10 classes"),
        ({"layers": []}, "must be MoE layers of the model.*Received: None"),
        ({"capacities": ("dropless",)}, "`capacities` must be numbers"),
        ({"capacities": 0}, "Received: 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        inspection.inspect(model_of("top_k"), batches(), **options)


@pytest.mark.backends("torch")
def test_bad_batches():
    model, (first, second) = model_of("top_k"), batches()
    with pytest.raises(ValueError, match="a batch without labels after"):
        inspection.inspect(model, [first, second[0]])
    with pytest.raises(ValueError, match="Put it into a list"):
        inspection.inspect(model, first[0])
    second[0][2] = np.nan
    with pytest.raises(ValueError, match="for image 8 .counted from 0"):
        inspection.inspect(tiny(moe={"images_per_group": 1}), [first, second])
    inner = keras.Sequential([keras.Input((8, 8, 3)), model])
    with pytest.raises(ValueError, match="Use the inner model, `model.get_"):
        inspection.inspect(inner, batches())


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inspection.patch_counts(np.array([[0, 7]]), 4), "top.*: 7"),
        (lambda: inspection.class_counts([[1]], [-1], 3), "labels.*: -1"),
        (lambda: inspection.patches_cdf([[5]], 3), "counts.*: 5"),
    ],
)
def test_decisions_that_are_out_of_range(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.backends("torch")
def test_experts_that_nobody_uses_are_like_nobody():
    found = inspection.similarity([[2, 0, 0], [1, 0, 0]])
    expected = [[1, 0, 0], [0, np.nan, np.nan], [0, np.nan, np.nan]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("share", "words"),
    [(1, "100%"), (0.998, "over 99%"), (0.001, "under 1%"), (0, "0%")],
)
def test_shares_in_words(share, words):
    assert report._percent(share) == words


@pytest.mark.backends("torch")
def test_many_classes_are_grouped():
    counts = np.arange(100 * 2).reshape(100, 2)
    names = [f"c{i}" for i in range(100)]
    rows, names = pictures._grouped_classes(counts, names)
    assert (len(names), names[0], names[-1]) == (34, "c0 … c2", "c99 … c99")
    assert rows.sum() == counts.sum()


@pytest.mark.backends("torch")
def test_the_command(trained, tmp_path):
    run_dir, _ = trained
    done = run("inspect", run_dir, f"--output={tmp_path / 'a'}", "--examples=0")
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'a' / 'index.html'}" in done.stdout
    assert "of 4 experts by first choice" in done.stdout
    page = (tmp_path / "a" / "index.html").read_text()
    assert "32 images" in page and "during training" in page
    assert "Which expert sees what" not in page, "no examples"
    path = tmp_path / "one.png"
    keras.utils.save_img(path, np.zeros((9, 9, 3)))
    done = run(
        "inspect", run_dir, "--images", path, path,
        f"--output={tmp_path / 'b'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "b" / "index.html").read_text()
    assert "The images have no labels" in page
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("")
    for more, words in (
        ([tmp_path / "none.keras"], "none.keras"),
        ([run_dir, "digits", "--images", path], "instead of a dataset"),
        ([run_dir, f"--output={tmp_path / 'c'}"], "which holds ['mine.txt']"),
    ):
        done = run("inspect", *more)
        assert done.returncode == 1 and words in done.stderr


@pytest.mark.backends("jax")
def test_on_several_devices():
    """The images are spread, in whole groups; a partial one is not."""
    expected = inspection.inspect(model_of("top_k"), batches(sizes=(9, 1)))
    devices = keras.distribution.list_devices()[:4]
    with keras.distribution.DataParallel(devices=devices).scope():
        model = model_of("top_k")
        found = inspection.inspect(model, batches(sizes=(9, 1)))
    for name, layer in expected.layers.items():
        for key in ("load", "class_counts", "patches_cdf", "examples"):
            np.testing.assert_array_equal(
                getattr(found.layers[name], key), getattr(layer, key)
            )
        assert found.layers[name].entropy == pytest.approx(layer.entropy)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("channels, seen", [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_channels_that_can_be_shown(channels, seen):
    assert _drawing.seen(np.zeros((2, 2, channels))).shape == (2, 2, seen)

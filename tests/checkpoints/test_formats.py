"""Other formats: `.npz` of the first ViTs, Orbax, resizing, architecture."""

import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe.checkpoints._npz import NAMES
from keras_vmoe.checkpoints.assignment import POSITIONS
from keras_vmoe.checkpoints.vmoe import vmoe_weights
from keras_vmoe.layers.positions import zoom
from keras_vmoe.training.initialization import initialize
from tests.golden.models import FOLDER
from tests.golden.models import build
from tests.golden.models import read
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

# Files; `test_vmoe.py` assigns what they hold on every backend.
pytestmark = pytest.mark.backends("torch")


def arrays_of(model):
    weights = vmoe_weights(model)
    return {k: ops.convert_to_numpy(v) for k, v in weights.items()}


def their_name(name):
    """A name of the V-MoE program in the layout of the first ViTs."""
    for theirs, ours in reversed(NAMES):
        inside = "MapHead/" in name or "MAPHead" in name
        if ours == "Mlp/" and inside:
            continue
        name = name.replace(ours, theirs)
    return name


def save_npz(path, model):
    arrays = {their_name(k): v for k, v in arrays_of(model).items()}
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("pooling", ["token", "gap", "map"])
def test_npz(pooling, tmp_path):
    model = randomize(tiny(moe=None, pooling=pooling, num_layers=2))
    path = tmp_path / "vit.npz"
    names = save_npz(path, model)
    block = "Transformer/encoderblock_1"
    assert f"{block}/MlpBlock_3/Dense_1/kernel" in names
    assert f"{block}/MultiHeadDotProductAttention_1/out/bias" in names
    assert f"{block}/LayerNorm_2/scale" in names
    config = checkpoints.vmoe_config(path)
    assert config["pooling"] == pooling and config["moe"] is None
    twin = checkpoints.load(type(model)(**config), path)
    images = images_of(3)
    np.testing.assert_array_equal(
        twin.predict(images, verbose=0), model.predict(images, verbose=0)
    )


def test_bad_npz(tmp_path):
    path = tmp_path / "vit.npz"
    with pytest.raises(FileNotFoundError):
        checkpoints.read(path)
    save_npz(path, tiny(moe=None, num_layers=1))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoints.CheckpointError, match="vit.npz"):
            checkpoints.read(path)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF  # The checksum no longer fits.
    path.write_bytes(bytes(changed))
    with pytest.raises(checkpoints.CheckpointError, match="whole .npz file"):
        checkpoints.read(path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was executed')",))


def test_npz_never_executes_code_or_takes_memory(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, x=np.array([Evil()], dtype=object))
    with pytest.raises(checkpoints.CheckpointError, match="claims"):
        checkpoints.read(path)
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("x.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(checkpoints.CheckpointError, match="claims shape"):
        checkpoints.read(path)


def test_npz_of_zeros_is_no_bomb(tmp_path):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, x=np.zeros(2_000_000, "float32"))
    assert checkpoints.read(path)["x"].shape == (2_000_000,)


def test_npz_with_a_huge_head_or_one_name_twice(tmp_path):
    path = tmp_path / "bomb.npz"
    head = b"\x93NUMPY\x02\x00" + (10**8).to_bytes(4, "little")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", head + b" " * 1000)
    with pytest.raises(checkpoints.CheckpointError, match="whole .npz file"):
        checkpoints.read(path)
    np.savez(path, a=np.ones(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a", "again")
    with pytest.raises(checkpoints.CheckpointError, match="one name twice"):
        checkpoints.read(path)


# Orbax.


def save_orbax(folder, tree):
    import orbax.checkpoint as orbax

    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def test_orbax(tmp_path):
    figures, weights, config = read("vit_last2_k2")
    tree = {}
    for name, array in weights.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    state = {"params": tree, "step": np.array(3), "opt_state": [np.zeros(2)]}
    folder = tmp_path / "1000"
    save_orbax(folder / "state", state)
    assert set(checkpoints.read(folder)) == set(weights)
    model = checkpoints.load(build(config), folder)
    got = model.predict(figures["input"], batch_size=4, verbose=0)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(arrays_of(model)["cls"], weights["cls"])


def test_an_orbax_bomb(tmp_path):
    save_orbax(tmp_path / "x", {"a": np.zeros((4096, 4096))})
    with pytest.raises(checkpoints.CheckpointError, match="claim to hold"):
        checkpoints.read(tmp_path / "x")


@pytest.mark.parametrize("share", [0, 0.5])
def test_orbax_files_cut_short(tmp_path, share):
    """Each file of a checkpoint is needed, or nothing depends on it."""
    arrays = {"a": np.arange(6.0), "b": np.ones((2, 3))}
    save_orbax(tmp_path / "x", arrays)
    refused = 0
    for path in sorted(tmp_path.rglob("*")):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        try:
            found = checkpoints.read(tmp_path / "x")
        except checkpoints.CheckpointError as error:
            assert str(tmp_path / "x") in str(error)
            refused += 1
        else:
            assert set(found) == set(arrays)
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array)
        path.write_bytes(whole)
    assert refused >= 2


# What is none of them.


def test_nothing_there(tmp_path):
    for name in ("none", "none.npz"):
        with pytest.raises(FileNotFoundError, match=name):
            checkpoints.read(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "model.keras", "weights.bin"])
def test_an_unknown_format(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_bytes(b"PK\x03\x04"[2:])
    words = f"V-MoE checkpoint, an Orbax folder, a .npz .*{name}, which is n"
    for function in (checkpoints.read, checkpoints.vmoe_config):
        with pytest.raises(checkpoints.CheckpointError, match=words):
            function(path)


def test_formats_are_told_apart_by_content(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(3.0))
    path = (tmp_path / "x.npz").rename(tmp_path / "weights")
    np.testing.assert_array_equal(checkpoints.read(path)["a"], np.arange(3.0))


# Fitting.


def test_zoom_by_hand():
    row = np.array([[[0.0], [3.0]]])
    np.testing.assert_allclose(zoom(row, (1, 4))[0, :, 0], [0, 1, 2, 3])
    square = np.array([[[0.0], [1.0]], [[2.0], [3.0]]])
    expected = [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]
    np.testing.assert_allclose(zoom(square, (3, 3))[..., 0], expected)
    np.testing.assert_allclose(zoom(square, (1, 1))[..., 0], [[0]])
    one = np.ones((1, 1, 2))
    np.testing.assert_allclose(zoom(one, (3, 2)), np.ones((3, 2, 2)))


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (7, 7), (4, 4)])
def test_zoom_is_scipys(shape):
    import scipy.ndimage as ndimage

    image = np.random.default_rng(0).normal(size=(4, 4, 3))
    factors = (shape[0] / 4, shape[1] / 4, 1)
    expected = ndimage.zoom(image, factors, order=1)
    np.testing.assert_allclose(zoom(image, shape), expected, atol=1e-12)


@pytest.mark.parametrize("pooling", ["token", "gap"])
def test_positions_of_another_resolution(pooling):
    small = randomize(tiny(num_layers=2, moe=None, pooling=pooling))
    large = tiny(num_layers=2, moe=None, pooling=pooling, image_size=(12, 16))
    arrays = arrays_of(small)
    checkpoints.load_vmoe(large, arrays)
    name = "Encoder/posembed_input/pos_embedding"
    got, old = arrays_of(large)[name], arrays[name]
    prefix = int(pooling == "token")
    assert got.shape == (1, 12 + prefix, 32)
    np.testing.assert_array_equal(got[0, :prefix], old[0, :prefix])
    expected = zoom(old[0, prefix:].reshape(2, 2, 32), (3, 4))
    np.testing.assert_allclose(got[0, prefix:].reshape(3, 4, 32), expected)


def ramp(rows, columns):
    """A table that says row and column of each patch, from 0 to 1."""
    grid = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    table = np.zeros((1, rows * columns, 32), "float32")
    table[0, :, :2] = np.moveaxis(grid, 0, -1).reshape(-1, 2)
    return table


GRIDS = [
    ((4, 4), (2, 8)), ((2, 8), (4, 4)), ((4, 9), (3, 5)), ((4, 16), (8, 8)),
]  # fmt: skip


@pytest.mark.parametrize("before", [0, 1, 5])  # Class and register tokens.
@pytest.mark.parametrize("old, new", GRIDS)
def test_rows_and_columns_of_rectangles_stay_so(old, new, before):
    first = np.full((1, before, 32), 7.0, "float32")
    table = np.concatenate([first, ramp(*old)], axis=1)
    extra = None if before < 2 else before
    resized = checkpoints.resize_positions(table, old, new, extra)
    expected = np.concatenate([first, ramp(*new)], axis=1)
    np.testing.assert_allclose(resized, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"Received: shape .*9 x 9 patches"):
        checkpoints.resize_positions(table, (9, 9), new)


@pytest.mark.backends("torch")
def test_a_wrong_grid_is_refused():
    """Tokens that it leaves are no registers, unless one says how many."""
    table = np.ones((1, 5 + 16, 8), "float32")
    for grid, extra in (((3, 4), None), ((3, 4), 5), (4, None), (4, 1)):
        with pytest.raises(ValueError, match="grid that it was made for"):
            checkpoints.resize_positions(table, grid, (8, 2), extra)
    assert checkpoints.resize_positions(table, 4, 2, 5).shape == (1, 9, 8)
    for grid in ("4", 0, (4, 4, 4), 4.0):
        with pytest.raises(ValueError, match="`grid` must be .*rows, columns"):
            checkpoints.resize_positions(table, grid, 2)
    with pytest.raises(ValueError, match="made for"):
        vit = tiny(num_layers=1, moe=None, pooling="gap", image_size=(8, 12))
        checkpoints.load_vmoe(vit, {POSITIONS: table}, grid=(3, 4))


@pytest.mark.parametrize("way", ["keras", "clone", "arrays", "weights"])
@pytest.mark.parametrize("old, new", GRIDS)
def test_rectangles_in_files(old, new, way, tmp_path):
    def vit(grid):
        size = (4 * grid[0], 4 * grid[1])
        return tiny(num_layers=2, moe=None, pooling="gap", image_size=size)

    source, model = vit(old), vit(new)
    source.get_layer("positions").embedding.assign(ramp(*old))
    if way == "arrays":
        checkpoints.load_vmoe(model, arrays_of(source), grid=old)
    elif way == "weights":
        source.save_weights(tmp_path / "m.weights.h5")
        checkpoints.load(model, tmp_path / "m.weights.h5")
    else:
        if way == "clone":
            weights = source.get_weights()
            source = keras.models.clone_model(source)
            source.set_weights(weights)
        initialize(model, models.save(source, tmp_path / "m.keras"))
    table = keras.ops.convert_to_numpy(model.get_layer("positions").embedding)
    np.testing.assert_allclose(table, ramp(*new), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_keras_files_of_another_resolution(tmp_path):
    """Keras alone says how to load them; all weights come from the file."""
    path, weights = tmp_path / "m.keras", tmp_path / "m.weights.h5"
    source = randomize(tiny(num_layers=2, moe=None, image_size=(8, 16)))
    model = randomize(tiny(num_layers=2, moe=None, image_size=(12, 16)), seed=1)
    source.save(path)
    source.compile("adam", "mse")  # No model's business but its own.
    source.optimizer.build(source.trainable_variables)
    source.save_weights(weights)
    for file in (path, weights):
        with pytest.raises(ValueError, match="checkpoints.load.model") as error:
            model.load_weights(file)
        assert len(str(error.value)) < 1000
    with pytest.warns(UserWarning, match="checkpoints.load.model, path"):
        model.load_weights(weights, skip_mismatch=True)
    before = arrays_of(model)
    with pytest.raises(ValueError, match="`grid` must match the file"):
        checkpoints.load(model, weights, grid=(4, 2))
    for changes in ({"num_layers": 1}, {"num_layers": 3}, {"mlp_dim": 8}):
        sizes = {"num_layers": 2, "image_size": (8, 16), **changes}
        other = tiny(moe=None, **sizes)
        own = other.get_weights()
        with pytest.raises(ValueError, match="must hold the weights") as error:
            checkpoints.load(other, weights)
        assert len(str(error.value)) < 600
        for array, value in zip(other.get_weights(), own, strict=True):
            np.testing.assert_array_equal(array, value)
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(array, before[name])
    checkpoints.load_vmoe(model, arrays_of(source), grid=(2, 4))
    expected = arrays_of(model)
    for file, grid in ((path, None), (weights, (2, 4)), (weights, None)):
        randomize(model, seed=2)
        checkpoints.load(model, file, grid=grid)
        for name, array in arrays_of(model).items():
            np.testing.assert_array_equal(array, expected[name])
    classes = randomize(tiny(num_layers=2, moe=None, num_classes=3))
    head = arrays_of(classes)["head/kernel"]
    with pytest.warns(UserWarning, match="has 10 classes.*keeps its own"):
        checkpoints.load(classes, path)
    np.testing.assert_array_equal(arrays_of(classes)["head/kernel"], head)
    checkpoints.load(tiny(num_layers=2, moe=None, num_classes=None), path)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_rectangle_of_as_many_patches_as_a_square(tmp_path):
    """Files say which it is; those of version 0.1.0 do not."""
    file = tmp_path / "m.weights.h5"
    model = randomize(tiny(moe=None, pooling="gap", image_size=(8, 32)))
    square = randomize(tiny(moe=None, pooling="gap", image_size=16))
    table = keras.ops.convert_to_numpy(model.get_layer("positions").embedding)
    model.save_weights(file)
    with pytest.raises(ValueError, match=r"grid \(2, 8\) for .*\(4, 4\)"):
        square.load_weights(file)
    checkpoints.load(square, file)
    found = keras.ops.convert_to_numpy(square.get_layer("positions").embedding)
    expected = checkpoints.resize_positions(table, (2, 8), (4, 4))
    np.testing.assert_array_equal(found, expected)
    with h5py.File(file, "r+") as weights:
        del weights["layers/learned_positions/vars/grid"]
    square.load_weights(file)
    with pytest.raises(ValueError, match="`grid`.* must be given"):
        checkpoints.load(model, file)
    checkpoints.load(randomize(model, seed=1), file, grid=(2, 8))
    found = model.get_layer("positions").embedding
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), table)


def test_a_head_of_another_size():
    moe = {"layers": [1]}
    old = randomize(tiny(num_layers=2, moe=moe))
    new = randomize(tiny(num_layers=2, moe=moe, num_classes=7), seed=1)
    with pytest.warns(UserWarning, match="has 10 classes and that of the mo"):
        checkpoints.load_vmoe(new, arrays_of(old))
    assert not arrays_of(new)["head/kernel"].any()
    np.testing.assert_array_equal(
        arrays_of(new)["embedding/kernel"], arrays_of(old)["embedding/kernel"]
    )
    features = tiny(num_layers=2, moe=moe, num_classes=None)
    checkpoints.load_vmoe(features, arrays_of(old))


# Architecture.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"moe": None, "pooling": "gap"},
        {"moe": {"hidden_dim": 16}, "pooling": "map", "num_classes": None},
        {"moe": {"router": "soft", "num_slots": 2, "images_per_group": 1}},
        {"moe": {"layers": "every_1"}, "representation_size": 8},
    ],
)
def test_the_architecture_is_found(arguments):
    model = randomize(tiny(**arguments))
    config = checkpoints.vmoe_config(arrays_of(model))
    twin = checkpoints.load_vmoe(type(model)(**config), arrays_of(model))
    shapes = [tuple(weight.shape) for weight in model.weights]
    assert [tuple(weight.shape) for weight in twin.weights] == shapes
    assert twin.pooling == model.pooling and twin.num_heads == 4


def test_architecture_with_sincos_positions():
    model = tiny(position_embedding="sincos2d")
    config = checkpoints.vmoe_config(arrays_of(model), image_size=8)
    assert config["position_embedding"] == "sincos2d"
    assert config["image_size"] == 8
    assert checkpoints.vmoe_config(arrays_of(model))["image_size"] == 224


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {}, "must be those of a V-MoE or ViT.* 0 arrays"),
        (lambda a: {**a, "embedding/kernel": np.ones(3)}, "another rank"),
        (lambda a: {**a, "Encoder/posembed_input/pos_embedding":
                    np.ones((1, 0, 32))}, "must form a square"),
        (lambda a: {**a, "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel":
                    np.ones((9, 32, 64))}, "must be alike"),
    ],
)  # fmt: skip
def test_no_architecture(change, words):
    with pytest.raises(ValueError, match=words):
        checkpoints.vmoe_config(change(arrays_of(tiny())))


def test_bad_arguments_of_the_architecture():
    with pytest.raises(ValueError, match="image_size=0"):
        checkpoints.vmoe_config({}, image_size=0)
    with pytest.raises(TypeError, match="arrays=None"):
        checkpoints.vmoe_config(None)


def test_a_folder_of_sharded_checkpoints_is_no_orbax_checkpoint():
    with pytest.raises(ValueError, match=r"which holds \['.*ckpt_1'\]"):
        checkpoints.read(FOLDER / "vit_checkpoint")
    words = r"Checkpoints in its folder: \['.*ckpt_1'\]"
    with pytest.raises(FileNotFoundError, match=words):
        checkpoints.read(FOLDER / "vit_checkpoint" / "ckpt_2")

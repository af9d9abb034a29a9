"""`read_vmoe`: the sharded format, and files that are not what they seem."""

import json
import pathlib
import shutil

import ml_dtypes
import msgpack
import numpy as np
import pytest

from keras_vmoe import checkpoints
from keras_vmoe.checkpoints.files import open_checkpoint
from keras_vmoe.checkpoints.sharded_index import read_index
from keras_vmoe.models import ViTMoE
from tests.checkpoints import writer
from tests.golden.models import FOLDER

# Files; `test_vmoe.py` assigns what they hold on every backend.
pytestmark = pytest.mark.backends("torch")

PREFIX = FOLDER / "vit_checkpoint" / "ckpt_1"


def unversioned(folder):
    """The golden checkpoint of the older format; its data are the same."""
    for path in PREFIX.parent.glob("*.data*"):
        shutil.copy(path, folder)
    name = "vit_checkpoint_unversioned/ckpt_1.index"
    shutil.copy(FOLDER / name, folder)
    return folder / "ckpt_1"


@pytest.mark.parametrize("versioned", [True, False])
def test_the_golden_checkpoint(versioned, tmp_path):
    prefix = PREFIX if versioned else unversioned(tmp_path)
    config = checkpoints.vmoe_config(prefix)
    expected = json.loads((FOLDER / "vit_checkpoint.json").read_text())
    assert config["hidden_dim"] == expected["hidden_size"]
    assert config["representation_size"] == expected["representation_size"]
    assert config["moe"] == {"layers": [1, 3], "num_experts": 8}
    figures = dict(np.load(FOLDER / "vit_checkpoint.npz"))
    moe = {**config["moe"], "noise_std": 0.0}
    model = ViTMoE(**{**config, "moe": moe})
    checkpoints.load_vmoe(model, prefix)
    images = figures["input"]
    got = model.predict(images, batch_size=len(images), verbose=0)
    scale = np.abs(figures["logits"]).max()
    np.testing.assert_allclose(
        got / scale, figures["logits"] / scale, atol=1e-5
    )


def arrays_of(*dtypes):
    generator = np.random.default_rng(0)
    arrays = {"scalar": np.array(3, "int32"), "empty": np.zeros((0, 4), "int8")}
    for dtype in dtypes or ("float32",):
        for name, shape in (("a/b", (6, 4)), ("a", ()), ("c/d/e", (5, 3, 2))):
            name = f"{np.dtype(dtype).name}/{name}".replace("/a/b", "/ab/b")
            values = 100 * generator.normal(size=shape)
            arrays[name] = np.asarray(values).astype(dtype)
    return arrays


def check(prefix, arrays):
    seen = []
    got = checkpoints.read_vmoe(prefix, lambda *done: seen.append(done))
    assert set(got) == set(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array)
    total = writer.nbytes(arrays)
    assert seen[-1] == (total, total)


def test_every_dtype(tmp_path):
    dtypes = ("float16", "float32", "float64", "bool", "uint8", "int64")
    arrays = arrays_of(*dtypes, ml_dtypes.bfloat16)
    writer.write(tmp_path / "all", arrays)
    check(tmp_path / "all", arrays)
    check(str(tmp_path / "all.index"), arrays)


@pytest.mark.parametrize("piece", [None, 1, 5])
@pytest.mark.parametrize("shards", [1, 3])
def test_parts_and_pieces(shards, piece, tmp_path):
    arrays = arrays_of()
    cuts = {"float32/ab/b": (3, 2), "float32/c/d/e": (1, 3, 1)}
    writer.write(tmp_path / "cut", arrays, shards, cuts, piece)
    check(tmp_path / "cut", arrays)


def test_of_a_training_state_the_parameters(tmp_path):
    arrays = {"x/w": np.arange(3.0), "y": np.ones((2, 2))}
    state = {f"params/{k}": v for k, v in arrays.items()}
    state |= {"opt_state/0/mu": np.zeros(7), "step": np.array(4)}
    writer.write(tmp_path / "state", state, shards=2)
    check(tmp_path / "state", arrays)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 255, 256, 65536])
def test_headers_of_every_length(size, tmp_path):
    arrays = {"w" * max(1, min(size, 300)): np.arange(size, dtype="uint8")}
    writer.write(tmp_path / "x", arrays, piece=max(1, size // 2))
    check(tmp_path / "x", arrays)


def test_remote_paths_go_through_tensorflow(tmp_path):
    arrays = arrays_of()
    writer.write(tmp_path / "far", arrays, shards=2)
    check(f"file://{tmp_path}/far", arrays)
    with pytest.raises(FileNotFoundError, match="There is no file file://"):
        checkpoints.read_vmoe(f"file://{tmp_path}/none")


# Bad files. Nothing may crash, hang, take memory or be half read.


TRUTH = {"a/w": np.arange(600.0).reshape(20, 30), "b": np.ones(4)}


@pytest.fixture
def good(tmp_path):
    """A small good checkpoint, to be spoilt."""
    prefix = tmp_path / "ckpt"
    writer.write(prefix, TRUTH, shards=2, cuts={"a/w": (2, 1)})
    return prefix


def data(prefix, shard=0):
    return prefix.with_name(f"ckpt.data-{shard:05d}-of-00002")


def refusal(prefix):
    """What the error says that a checkpoint must be refused with."""
    with pytest.raises(
        checkpoints.CheckpointError, match="Received: "
    ) as error:
        checkpoints.read_vmoe(prefix)
    return str(error.value)


def changed_bytes(path, positions, values):
    """Writes a file with each byte changed in turn, and yields its position."""
    whole = path.read_bytes()
    for position in positions:
        for value in values:
            changed = bytearray(whole)
            changed[position] = value
            path.write_bytes(changed)
            yield position


def read_or_none(prefix):
    """The arrays of a checkpoint, or None if it is refused."""
    try:
        return checkpoints.read_vmoe(prefix)
    except (checkpoints.CheckpointError, FileNotFoundError):
        return None


def test_missing_files(good):
    data(good, 1).unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002"):
        checkpoints.read_vmoe(good)
    with pytest.raises(FileNotFoundError, match="none.index"):
        checkpoints.read_vmoe(good.with_name("none"))


@pytest.mark.parametrize("file", ["index", "data"])
def test_files_cut_anywhere(good, file):
    path = data(good) if file == "data" else good.with_name("ckpt.index")
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        assert path.name in refusal(good)


def test_any_changed_byte_is_refused_or_its_own_number(good):
    """Only a byte of the numbers may change, and then only its number."""
    path = data(good)
    numbers = path.read_bytes().index(TRUTH["a/w"][:10].tobytes())
    refused = 0
    values = (0x00, 0x7F, 0xC1, 0xDF, 0xC9, 0xFF)
    for position in changed_bytes(path, range(120), values):
        found = read_or_none(good)
        refused += found is None
        assert found is not None or position < numbers
        if found is not None:
            assert found.keys() == TRUTH.keys()
            np.testing.assert_array_equal(found["b"], TRUTH["b"])
            other = (found["a/w"] != TRUTH["a/w"]).ravel().nonzero()[0]
            place = (position - numbers) // 8
            assert set(other) <= ({place} if position >= numbers else set())
    assert refused > numbers


def test_any_changed_byte_of_the_index(good):
    """What is not refused has the same arrays, maybe by another name."""
    path = good.with_name("ckpt.index")
    truth = sorted(x.tobytes() for x in TRUTH.values())
    refused = 0
    positions = range(path.stat().st_size)
    for _ in changed_bytes(path, positions, (0x00, 0x7F, 0xC1, 0xDF, 0xFF)):
        found = read_or_none(good)
        refused += found is None
        if found is not None:
            assert sorted(x.tobytes() for x in found.values()) == truth
            assert {x.shape for x in found.values()} == {(20, 30), (4,)}
    assert refused > 2 * len(positions)


def test_a_foreign_file(good):
    good.with_name("ckpt.index").write_bytes(b"\x89PNG\r\n" + bytes(100))
    assert "ckpt.index" in refusal(good)
    good.with_name("ckpt.index").write_bytes(msgpack.packb([1, 2]))
    assert "no index of a V-MoE checkpoint" in refusal(good)


def index_with(good, **changes):
    index = msgpack.unpackb(
        good.with_name("ckpt.index").read_bytes(), strict_map_key=False
    )
    index |= changes
    good.with_name("ckpt.index").write_bytes(msgpack.packb(index))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "30000101"}, "the version is '30000101'"),
        ({"shard_count": -1}, "no index"),
        ({"shard_count": 10**12}, "no index"),
        ({"shard_count": "../../x"}, "no index"),
        ({"shard_count": 1}, "in shards"),
        ({"index": {"a": 3}}, "a is not an array but of type int"),
        ({"index": {"a": msgpack.ExtType(77, b"x")}}, "of type 77"),
        ({"index": {"a": msgpack.ExtType(8, b"\xc1")}}, "entry of a cannot"),
        ({"index": {1: msgpack.ExtType(8, b"")}}, "a name is 1, not a plain"),
        ({"index": {"a/b": 1}}, "a name is 'a/b', not a plain string"),
        ({"index": {}}, "no array is named"),
    ],
)
def test_hostile_indices(good, changes, words):
    index_with(good, **changes)
    assert words in refusal(good)


def leaf(shape, dtype, parts, shards):
    head = msgpack.packb((shape, dtype, False, {}))
    return writer.ext(8, head, tuple(map(writer.slices, parts)), shards)


HUGE = 2**40


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (leaf([4], "object", [[(0, 4)]], [0]), "unknown dtype 'object'"),
        (leaf([-4], "float32", [[(0, 4)]], [0]), "shape [-4]"),
        (leaf([1] * 65, "int8", [[(0, 1)] * 65], [0]), "in shards"),
        (leaf([0, 2**63], "int8", [[(0, 0), (0, 2**63)]], [0]), "in shards"),
        (leaf([4], ["float32"], [[(0, 4)]], [0]), "unknown dtype"),
        (leaf([4], "float32", [[(0, 4)]], 3), "in shards"),
        (leaf([4], "float32", [[(0, 4)]], None), "in shards"),
        (leaf([4], "float32", [[(0, 3)]], [0]), "do not make up shape"),
        (leaf([4], "float32", [[(0, 9)]], [0]), "do not make up shape"),
        (leaf([4], "float32", [[(0, 2)], [(1, 4)]], [0, 1]), "do not make up"),
        (leaf([4], "float32", [[(0, 4)]] * 2, [0, 1]), "do not make up"),
        (leaf([4], "float32", [[(0, 4)]], [7]), "in shards [7] of 2"),
        (leaf([4], "float32", [[(0, 4)]], []), "in shards []"),
        # Claims more than all files hold: no array is made.
        (leaf([HUGE], "float64", [[(0, HUGE)]], [0]), "what the index expects"),
        (leaf([2], "float64", [[(0, 2)]], [1]), "what the index expects"),
        (leaf([HUGE], "int8", [[(0, HUGE)]], [1]), "dtype 'float64', not int8"),
    ],
)
def test_hostile_entries(good, entry, words):
    index_with(good, index={"a": entry})
    assert words in refusal(good)


def test_deep_names(good):
    tree = leaf([1], "int8", [[(0, 1)]], [0])
    for _ in range(200):
        tree = {"a": tree}
    index_with(good, index=tree)
    assert "nested deeper than 32" in refusal(good)
    nested = b"\x81\xa1a" * 100_000
    good.with_name("ckpt.index").write_bytes(nested)
    assert "MessagePack cannot be read" in refusal(good)


def test_lengths_beyond_the_end(tmp_path):
    path = tmp_path / "x"
    for content in (b"\xc9\xff\xff\xff\xff\x01", b"\xc6\xff\xff\xff\xff"):
        path.write_bytes(content)
        with open_checkpoint(path) as reader:
            with pytest.raises(checkpoints.CheckpointError):
                reader.extension_header()
            with pytest.raises(checkpoints.CheckpointError, match="follow"):
                reader.advance(2**40)
    path.write_bytes(b"\xdb\xff\xff\xff\xff")
    with open_checkpoint(path) as reader:
        words = "4294967295 bytes must follow and 0 are left"
        with pytest.raises(checkpoints.CheckpointError, match=words):
            reader.string()


def test_a_folder_in_the_place_of_a_file(good):
    data(good).unlink()
    data(good).mkdir()
    with pytest.raises(OSError, match="ckpt.data-00000"):
        checkpoints.read_vmoe(good)


def test_a_prefix_is_only_a_prefix(good):
    assert set(read_index(good).entries) == {"a/w", "b"}
    assert pathlib.Path(read_index(good).shard_path(1)) == data(good, 1)

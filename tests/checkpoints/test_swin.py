"""Files of Swin-MoE, one for each GPU, in the layout of the authors."""

import numpy as np
import pytest
import torch

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.checkpoints.swin import swin_weights
from keras_vmoe.training import initialization
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.models.test_swin import tiny

pytestmark = pytest.mark.backends("torch")
PARTS = {
    "attention_norm": "norm1", "mlp_norm": "norm2",
    "attention/query_key_value": "attn.qkv", "attention/output": "attn.proj",
    "attention/bias_hidden": "attn.cpb_mlp.0",
    "attention/bias_output": "attn.cpb_mlp.2",
    "mlp/hidden": "mlp.fc1", "mlp/output": "mlp.fc2",
    "moe/gate": "mlp._moe_layer.gates.0.wg",
}  # fmt: skip
OTHERS = {
    "stem": "patch_embed.proj", "stem_norm": "patch_embed.norm",
    "downsample_1": "layers.0.downsample.reduction",
    "downsample_1_norm": "layers.0.downsample.norm",
    "norm": "norm", "head": "head",
}  # fmt: skip


def block_of(name):
    """`layers.1.blocks.0` of `block_2_...`, two blocks in each stage."""
    number = int(name.split("_")[1])
    return f"layers.{number // 2}.blocks.{number % 2}"


def shared_arrays(model):
    """What all GPUs have, by the authors' names."""
    found = {}
    for name, weight in swin_weights(model).items():
        if "/experts/" in name:
            continue
        layer, kind = name.rsplit("/", 1)
        theirs = OTHERS.get(layer)
        if theirs is None:
            part = layer.split("_", 2)[2]
            theirs = f"{block_of(layer)}.{PARTS[part]}"
        x = np.asarray(float64(weight), "float32")
        if kind == "kernel":
            x = x.transpose((3, 2, 0, 1) if x.ndim == 4 else (1, 0))
        kind = "bias" if kind == "bias" else "weight"
        found[f"{theirs}.{kind}"] = x
    # What the program makes anew.
    table = np.zeros((1, 7, 7, 2), "float32")  # Windows of 4.
    for stage in range(2):
        name = f"layers.{stage}.blocks.0.attn.relative_coords_table"
        found[name] = table
    found["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), "float32")
    return found


def rank_arrays(model, world):
    """For each GPU its experts, or its part of the features of one."""
    ranks = [{} for _ in range(world)]
    for layer in model.moe_layers:
        start = f"{block_of(layer.name)}.mlp._moe_layer.experts.batched_"
        bank, count = layer.experts, layer.num_experts
        arrays = {
            "fc1_w": float64(bank.hidden_kernel).transpose(0, 2, 1),
            "fc1_bias": float64(bank.hidden_bias),
            "fc2_w": float64(bank.output_kernel),
            "fc2_bias": np.zeros((count, bank.output_kernel.shape[-1])),
        }
        for name, x in arrays.items():
            x = x.reshape(world, -1, *x.shape[2:]) if world > count else x
            parts = np.split(x, world)
            for rank, part in zip(ranks, parts, strict=True):
                if world > count:
                    part = part.reshape(1, -1, *x.shape[2:])
                rank[start + name] = part.astype("float32")
    return ranks


def save(path, arrays):
    state = {name: torch.tensor(x) for name, x in arrays.items()}
    torch.save({"model": state}, path)


def write(folder, model, world, master=True):
    """The files of a training on so many GPUs; returns their prefix."""
    path = folder / "swin.pth"
    shared = shared_arrays(model)
    for rank, arrays in enumerate(rank_arrays(model, world)):
        arrays = arrays if master else {**arrays, **shared}
        save(f"{path}.rank{rank}", arrays)
    if master:
        save(f"{path}.master", shared)
    return path


def sparse(num_experts=4, **arguments):
    moe = {"layers": "last_2", "num_experts": num_experts, "dropout": 0.1,
           "capacity_factor": 1.25, "batch_priority": True}  # fmt: skip
    return randomize(tiny(moe=moe, **arguments))


def outputs(model):
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 16, 16, 3)).astype("float32")
    return float64(model(images))


@pytest.mark.parametrize(
    ("num_experts", "world"), [(4, 4), (4, 2), (2, 4), (3, 3)]
)
@pytest.mark.parametrize("master", [True, False])
def test_the_files_of_a_training(tmp_path, num_experts, world, master):
    """An expert on each GPU, several, or one on several."""
    model = sparse(num_experts)
    path = write(tmp_path, model, world, master)
    arrays = checkpoints.read(path)
    config = checkpoints.swin_config(arrays, image_size=16)
    assert config["moe"]["layers"] == [1, 3] and config["window_size"] == 4
    made = models.SwinMoE(**config)
    assert checkpoints.load(made, path) is made
    np.testing.assert_array_equal(outputs(made), outputs(model))
    assert made.preprocessing.mean[0] == pytest.approx(123.675)
    # Named by one of the files, too.
    again = checkpoints.read(f"{path}.rank0")
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, again[name])


def test_a_dense_model(tmp_path):
    model = randomize(tiny(moe=None))
    save(tmp_path / "dense.pth.global", shared_arrays(model))
    arrays = checkpoints.read(tmp_path / "dense.pth")
    config = checkpoints.swin_config(arrays, image_size=(16, 16))
    made = checkpoints.load(models.SwinMoE(**config), tmp_path / "dense.pth")
    np.testing.assert_array_equal(outputs(made), outputs(model))
    assert checkpoints.swin_config(arrays)["image_size"] == 64


def test_a_run_starts_from_them(tmp_path):
    """Of other classes: the head is new, all else is theirs."""
    path = write(tmp_path, sparse(), 4)
    config = training.TrainConfig(
        model=training.ModelConfig(init=str(path), image_size=16),
        data=training.DataConfig(dataset="digits"),
    )
    from keras_vmoe.training import building
    from keras_vmoe.training.architecture import resolved

    found = resolved(config)
    assert found.family == "swin" and found.swin.dims == (8, 12)
    model = building.make_model(config, 7)
    with pytest.warns(UserWarning, match="10 classes and that of the model 7"):
        initialization.initialize(model, path)
    kernel = model.get_layer("block_3_moe").experts.hidden_kernel
    arrays = checkpoints.read(path)
    expected = arrays["block_3_moe/experts/hidden_kernel"]
    np.testing.assert_array_equal(float64(kernel), expected)


def test_a_file_that_is_missing(tmp_path):
    path = write(tmp_path, sparse(), 4)
    (tmp_path / "swin.pth.rank2").unlink()
    words = "of 4 GPUs. Received: 3 files, without .rank2, which holds expert 2"
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(path)
    path = write(tmp_path, sparse(2), 4)
    (tmp_path / "swin.pth.rank3").unlink()
    words = "holds expert 1 of each layer, part 2 of 2"
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(path)
    for rank in range(3):
        (tmp_path / f"swin.pth.rank{rank}").unlink()
    with pytest.raises(checkpoints.CheckpointError, match="without them"):
        checkpoints.read(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.read(tmp_path / "other.pth")
    path = write(tmp_path, sparse(), 4)
    with pytest.raises(FileNotFoundError, match="no swin.pth.rank9"):
        checkpoints.read(f"{path}.rank9")
    (tmp_path / "swin.pth.master").unlink()
    with pytest.raises(checkpoints.CheckpointError, match="without .master"):
        checkpoints.read(path)
    path = write(tmp_path, sparse(), 4, master=False)
    (tmp_path / "swin.pth.rank0").unlink()
    for name in (path, f"{path}.rank0"):
        with pytest.raises(checkpoints.CheckpointError, match="without .rank0"):
            checkpoints.read(name)


def test_a_model_that_was_gathered(tmp_path):
    model = sparse()
    (experts,) = rank_arrays(model, 1)
    save(tmp_path / "swin.pth.global", {**shared_arrays(model), **experts})
    made = models.SwinMoE(**checkpoints.swin_config(
        checkpoints.read(tmp_path / "swin.pth"), image_size=16
    ))  # fmt: skip
    checkpoints.load(made, tmp_path / "swin.pth")
    np.testing.assert_array_equal(outputs(made), outputs(model))


@pytest.mark.parametrize("change", ["no array", "no block", "another shape"])
def test_a_rank_without_its_arrays(tmp_path, change):
    path = write(tmp_path, sparse(), 4)
    arrays = rank_arrays(sparse(), 4)[1]
    first = next(x for x in arrays if x.endswith("fc1_bias"))
    if change == "another shape":
        arrays[first] = arrays[first][:, :-1]
    else:
        arrays.pop(first)
    if change == "no block":
        start = first.removesuffix("fc1_bias")
        arrays = {k: x for k, x in arrays.items() if not k.startswith(start)}
    save(f"{path}.rank1", arrays)
    words = "must hold layers.*Received: swin.pth.rank1"
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(path)


def test_an_expert_on_each_gpu_of_another_ratio(tmp_path):
    model = sparse(mlp_ratio=2)
    path = write(tmp_path, model, 4)
    made = models.SwinMoE(**checkpoints.swin_config(checkpoints.read(path), 16))
    checkpoints.load(made, path)
    np.testing.assert_array_equal(outputs(made), outputs(model))


def test_images_of_another_size_keep_the_bias_of_an_offset(tmp_path):
    path = write(tmp_path, sparse(), 4)
    config = checkpoints.swin_config(checkpoints.read(path), image_size=32)
    assert config["pretrained_window_sizes"] == (4, 4)
    with pytest.raises(ValueError, match="`swin_config`"):
        checkpoints.vmoe_config(path)


def test_files_of_another_number_of_gpus(tmp_path):
    write(tmp_path, sparse(), 4)
    path = write(tmp_path, sparse(), 2)
    with pytest.raises(checkpoints.CheckpointError, match="swin.pth.rank2"):
        checkpoints.read(path)


class Program:
    """What a pickle could run."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": Program()}, "no code in it is run"),
        ({"model": {}}, "a `model` with arrays"),
        ({"model": {"fc.weight": torch.ones(2, 2)}}, "with fc.weight"),
        (
            {"model": {"layers.0.blocks.1.mlp._moe_layer.gates.0."
                       "cosine_projector.weight": torch.ones(2, 2)}},
            "a cosine one",
        ),
    ],
)  # fmt: skip
def test_files_of_something_else(tmp_path, capsys, content, words):
    torch.save(content, tmp_path / "swin.pth.rank0")
    with pytest.raises(checkpoints.CheckpointError, match=words) as caught:
        checkpoints.read(tmp_path / "swin.pth")
    # PyTorch's advice, in bold letters, is how to run it after all.
    assert "\x1b" not in str(caught.value)
    assert "two options" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


def test_a_broken_file(tmp_path):
    path = write(tmp_path, sparse(), 2)
    file = tmp_path / "swin.pth.rank1"
    for content in (file.read_bytes()[:2000], b"abc"):
        file.write_bytes(content)
        with pytest.raises(checkpoints.CheckpointError, match="whole and hold"):
            checkpoints.read(path)


def test_a_bias_that_has_no_place(tmp_path):
    model = sparse()
    path = write(tmp_path, model, 2)
    (first, _) = rank_arrays(model, 2)
    name = next(x for x in first if x.endswith("fc2_bias"))
    first[name] += 1
    save(tmp_path / "swin.pth.rank0", first)
    with pytest.raises(checkpoints.CheckpointError, match="that is not 0"):
        checkpoints.read(path)


def test_another_architecture(tmp_path):
    path = write(tmp_path, sparse(), 4)
    with pytest.raises(ValueError, match="`checkpoints.swin_config` finds it"):
        checkpoints.load(sparse(dims=(8, 24)), path)
    with pytest.raises(TypeError, match="must be a SwinMoE"):
        checkpoints.load(models.ConvNeXtMoE((1,), (8,), 10), path)

"""Weights of timm and torchvision, compared with their own models."""

import dataclasses
import json
import os
import re
import types

import numpy as np
import pytest
import torch

from tests.torchvision_operators import OPERATORS

assert OPERATORS  # Before timm is imported.

import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torchvision.models import convnext  # noqa: E402

from keras_vmoe import checkpoints  # noqa: E402
from keras_vmoe import data  # noqa: E402
from keras_vmoe import models  # noqa: E402
from keras_vmoe import training  # noqa: E402
from keras_vmoe.models.costs import without_weights  # noqa: E402
from keras_vmoe.training import initialization  # noqa: E402
from tests.commands import run  # noqa: E402

once = pytest.mark.backends("torch")
# Plain ViTs, which have no `config.json` beside them here.
pytestmark = pytest.mark.filterwarnings("ignore:.*how images are normalized")
SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 56}
BLOCKS = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
IMAGENET = data.Preprocessing.imagenet()


def torchvisions():
    sizes = [(16, 32, 1), (32, 48, 2), (48, None, 1)]
    settings = [convnext.CNBlockConfig(*size) for size in sizes]
    return convnext.ConvNeXt(settings, num_classes=10)


def authors():
    """timm's under the names of the authors' program, which is not packaged."""
    model = timm.create_model("convnext_tiny", num_classes=10, **BLOCKS)
    state, names = {}, (
        ("stem.", "downsample_layers.0."), (".blocks.", "."),
        ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("head.norm", "norm"),
        ("head.fc", "head"),
    )  # fmt: skip
    randomize(model)
    for name, x in model.state_dict().items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        if name.startswith("stages") and ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        state[name] = x
    return model, state


MODELS = {
    "vit": lambda: timm.create_model(
        "vit_small_patch16_224", num_classes=10, **{**SMALL, "img_size": 48}
    ),
    "deit3": lambda: timm.create_model(
        "deit3_small_patch16_224", num_classes=10, **{**SMALL, "img_size": 48}
    ),
    # 2 x 4 patches and a class token: as many as 3 x 3 patches.
    "vit, wide": lambda: timm.create_model(
        "vit_small_patch16_224",
        num_classes=10,
        **{**SMALL, "img_size": (32, 64)},
    ),
    "deit3, wide": lambda: timm.create_model(
        "deit3_small_patch16_224",
        num_classes=10,
        **{**SMALL, "img_size": (32, 96)},
    ),
    "dinov2": lambda: timm.create_model("vit_small_patch14_dinov2", **SMALL),
    "dinov2 with registers": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", **SMALL
    ),
    "convnext of timm": lambda: timm.create_model(
        "convnext_tiny", num_classes=10, **BLOCKS
    ),
    "convnext of torchvision": torchvisions,
    "convnext of its authors": authors,
}


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def written(name, folder, **more):
    """A model of others, and the file of its weights."""
    made = MODELS[name]()
    model, state = made if isinstance(made, tuple) else (made, None)
    if state is None:
        state = randomize(model).state_dict()
    file = folder / "model.safetensors"
    save_file({**state, **more}, file)
    return model.eval(), file


def twin(name, file):
    """The model of ours for a file."""
    if "convnext" in name:
        config = checkpoints.convnext_config(file, image_size=64)
        return models.ConvNeXtMoE(**config)
    sizes = {"vit, wide": (32, 64), "deit3, wide": (32, 96)}
    config = checkpoints.vmoe_config(file, sizes.get(name))
    return models.ViTMoE(**config)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_theirs(name, tmp_path):
    theirs, file = written(name, tmp_path)
    ours = twin(name, file)
    checkpoints.load(ours, file)
    shape = (2, *ours.input_shape[1:])
    images = np.random.default_rng(1).normal(size=shape).astype("float32")
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    scale = np.abs(expected).max()
    got = ours.predict(images, verbose=0)
    np.testing.assert_allclose(got / scale, expected / scale, atol=1e-4)
    wanted = data.Preprocessing() if name[:3] == "vit" else IMAGENET
    assert ours.preprocessing == wanted


@once
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_positions_are_resized_as_timm_resizes_them(name, tmp_path):
    """Bicubic with antialiasing, to fewer and to more patches."""
    theirs, file = written(name, tmp_path)
    patch = theirs.patch_embed.patch_size[0]
    for rows, columns in ((2, 3), (7, 5), (3, 3)):
        size = (rows * patch, columns * patch)
        ours = models.ViTMoE(**checkpoints.vmoe_config(file, size))
        checkpoints.load(ours, file)
        expected = timm.layers.resample_abs_pos_embed(
            theirs.pos_embed.data, (rows, columns)
        )
        found = ours.get_layer("positions").embedding
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@once
def test_positions_that_are_no_square(tmp_path):
    _, file = written("vit, wide", tmp_path)
    with pytest.raises(ValueError, match=r"Set `image_size=\(height, width\)`"):
        checkpoints.vmoe_config(file)
    config = checkpoints.vmoe_config(file, 64)
    ours = models.ViTMoE(**config)
    with pytest.raises(
        ValueError, match=r"unless `grid` is given. Received: 9"
    ):
        checkpoints.load(ours, file)
    checkpoints.load(ours, file, grid=(2, 4))
    assert ours.get_layer("positions").embedding.shape == (1, 17, 128)


@once
@pytest.mark.parametrize("name", ["deit3", "convnext of timm"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(name, channels, tmp_path):
    """The model keeps its mean: that of the weights is of three channels."""
    kind, sizes = "deit3_small_patch16_224", {**SMALL, "img_size": 48}
    if name != "deit3":
        kind, sizes = "convnext_tiny", BLOCKS
    theirs = timm.create_model(kind, in_chans=channels, **sizes)
    file = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), file)
    if name == "deit3":
        ours = models.ViTMoE(**checkpoints.vmoe_config(file))
    else:
        ours = models.ConvNeXtMoE(**checkpoints.convnext_config(file, 64))
    with pytest.warns(UserWarning, match=f"not those of {channels} channel"):
        checkpoints.load(ours, file)
    assert ours.preprocessing == data.Preprocessing(channels=channels)
    start = training.ModelConfig(init=str(file))
    start = training.TrainConfig(model=start, moe=None)
    found = training.architecture.resolved(start).data
    assert (found.channels, found.mean) == (channels, 127.5)


@once
def test_models_that_ours_are_not(tmp_path):
    state = randomize(MODELS["vit"]()).state_dict()
    file = tmp_path / "model.safetensors"
    rotary = {k: x for k, x in state.items() if k != "pos_embed"}
    save_file(rotary, file)
    with pytest.raises(checkpoints.CheckpointError, match="rotary"):
        checkpoints.read(file)
    wide = {"stem.0.weight": torch.zeros(384, 3, 4, 4)}
    save_file(wide, file)
    with pytest.raises(checkpoints.CheckpointError, match="another epsilon"):
        checkpoints.read(file)
    gated = {k: x.clone() for k, x in state.items()}
    for i in (0, 1):
        gated[f"blocks.{i}.mlp.fc1.weight"] = torch.zeros(1024, 128)
        gated[f"blocks.{i}.mlp.fc1.bias"] = torch.zeros(1024)
    save_file(gated, file)
    ours = models.ViTMoE(**checkpoints.vmoe_config(file))
    with pytest.raises(ValueError, match="SwiGLU"):
        checkpoints.load(ours, file)
    save_file({f"model.{k}": x for k, x in state.items()}, file)
    with pytest.warns(UserWarning, match="mean and std 127.5 are assumed"):
        assert "embedding/kernel" in checkpoints.read(file)


@once
def test_a_convnext_from_the_command(tmp_path):
    _, file = written("convnext of timm", tmp_path)
    output = tmp_path / "model.keras"
    done = run("convert", file, output, "--image_size=64")
    assert done.returncode == 0, done.stderr
    found = models.load(output)
    assert found.input_shape == (None, 64, 64, 3) and found.moe is None
    assert found.preprocessing == IMAGENET
    # Of a file, and of one of Keras whose patch size is the default.
    keras_file = tmp_path / "default.keras"
    default = models.ConvNeXtMoE((1, 1), (8, 16), 10, image_size=32)
    models.save(default, keras_file)
    for start in (file, keras_file):
        done = run(
            "train", f"--init={start}", "--upcycle", "--moe.num_experts=2",
            "--image_size=32", "--dry_run",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "patch_size: 4" in done.stdout


@once
def test_heads_sizes_and_classes_of_ones_own(tmp_path):
    """Positions are resized, a missing or other head is new."""
    _, file = written("deit3", tmp_path)
    config = checkpoints.vmoe_config(file)
    small = models.ViTMoE(
        **{**config, "image_size": (32, 64), "num_classes": 3, "num_heads": 4}
    )
    with pytest.warns(UserWarning, match="has 10 classes"):
        checkpoints.load(small, file)
    assert small.get_layer("positions").embedding.shape == (1, 9, 128)
    first = np.array(small.get_layer("positions").embedding)[0, 0]
    assert not first.any()  # The class token of DeiT III has no position.
    kernel = small.get_layer("block_0_attention").weights[0]
    arrays = checkpoints.read(file)
    query = arrays["Encoder/encoderblock_0/SelfAttention/query/kernel"]
    np.testing.assert_array_equal(np.array(kernel), query.reshape(128, 4, 32))
    _, file = written("dinov2", tmp_path)
    config = {**checkpoints.vmoe_config(file), "num_classes": 3}
    with pytest.warns(UserWarning, match="has 0 classes"):
        checkpoints.load(models.ViTMoE(**config), file)
    headless = models.ViTMoE(**{**config, "num_classes": None})
    checkpoints.load(headless, file)


def by_transformers_names(state):
    """timm's arrays as Transformers' DINOv2 has them."""
    found = {}
    names = (
        ("blocks.", "encoder.layer."), ("attn.proj", "attention.output.dense"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"), ("cls_", "embeddings.cls_"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    )  # fmt: skip
    for name, x in state.items():
        for theirs, others in names:
            name = name.replace(theirs, others)
        name = name.replace("norm.", "layernorm.") if name[0] == "n" else name
        parts = ["qkv"]
        if "attn.qkv" in name:
            parts = ["query", "key", "value"]
        for part, y in zip(parts, x.chunk(len(parts)), strict=True):
            new = name.replace("attn.qkv", f"attention.attention.{part}")
            found[f"dinov2.{new}"] = y.contiguous()
    return {**found, "dinov2.embeddings.mask_token": torch.zeros(1, 128)}


@once
def test_the_names_of_transformers(tmp_path):
    theirs, file = written("dinov2", tmp_path)
    expected = checkpoints.read(file)
    save_file(by_transformers_names(theirs.state_dict()), file)
    found = checkpoints.read(file)
    assert found.arguments == expected.arguments
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@once
def test_what_lies_beside_a_file_says_how_images_are_normalized(tmp_path):
    _, file = written("vit", tmp_path)
    config = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
              "interpolation": "bicubic", "crop_pct": 0.9}  # fmt: skip
    text = json.dumps({"pretrained_cfg": config})
    (tmp_path / "config.json").write_text(text)
    ours = models.ViTMoE(**checkpoints.vmoe_config(file))
    checkpoints.load(ours, file)
    found = ours.preprocessing
    np.testing.assert_allclose(found.mean, IMAGENET.mean, atol=1e-4)
    assert found.interpolation == "bicubic" and found.test_crop == 0.9
    # What starts a run is what the model is made by.
    start = training.TrainConfig(
        model=training.ModelConfig(init=str(file)), moe=None
    )
    config = training.architecture.resolved(start)
    assert config.data.mean == found.mean and config.data.test_crop == 0.9
    assert config.model.activation == "gelu"
    # But for what the user sets.
    start = dataclasses.replace(start, data=training.config.DataConfig(mean=9))
    with pytest.warns(UserWarning, match="newly init"):
        model = initialization.starting_model(
            start,
            types.SimpleNamespace(num_classes=3, class_names=()),
        )
    assert model.preprocessing.mean == 9 and model.preprocessing.std != 127.5


@once
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"pretrained_cfg": 3}',
     '{"pretrained_cfg": {"mean": "abc", "std": [1, 1, 1]}}',
     '{"pretrained_cfg": {"mean": [0, 0], "std": [0, 1]}}'],
)  # fmt: skip
def test_what_lies_beside_a_file_may_be_anything(tmp_path, text):
    _, file = written("dinov2", tmp_path)
    (tmp_path / "config.json").write_text(text)
    found = checkpoints.read(file).preprocessing
    assert data.Preprocessing.of(found) == IMAGENET


@once
def test_one_value_beside_a_file_that_is_not_ours(tmp_path):
    _, file = written("vit", tmp_path)
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "lanczos"}
    text = json.dumps({"pretrained_cfg": config})
    (tmp_path / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="interpolation='lanczos' is unknown"):
        found = checkpoints.read(file).preprocessing
    assert data.Preprocessing.of(found) == data.Preprocessing(127.5, 63.75)


@once
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.attn.qkv.weight", (10, 128)),
        ("blocks.0.attn.qkv.bias", ()),
        ("blocks.1.attn.proj.weight", (3,)),
        ("pos_embed", (5,)),
    ],
)
def test_arrays_of_another_rank(tmp_path, name, shape):
    _, file = written("dinov2", tmp_path, **{name: torch.zeros(shape)})
    words = re.escape(f"with {name} {shape}")
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(file)


@once
def test_all_models_of_timm_that_are_named(tmp_path):
    """Their heads, which no shape tells, and what they have beside weights."""
    for name, heads in (
        ("vit_tiny_patch16_224", 3), ("vit_base_patch16_224", 12),
        ("vit_huge_patch14_224", 16), ("deit3_large_patch16_224", 16),
        ("vit_base_patch14_dinov2", 12),
    ):  # fmt: skip
        with torch.device("meta"):
            theirs = timm.create_model(name, depth=1)
        state = {k: np.zeros(x.shape, "bool") for k, x in
                 theirs.state_dict().items()}  # fmt: skip
        arrays = checkpoints._torch.by_our_names(state, tmp_path / name)
        config = checkpoints.vmoe_config(arrays)
        assert config["num_heads"] == heads
        with without_weights():
            ours = models.ViTMoE(**config)
        count = sum(x.numel() for x in theirs.parameters())
        extra = config["hidden_dim"] if "deit3" in name else 0
        assert ours.count_params() == count + extra


@once
def test_sixteen_bits(tmp_path):
    made = randomize(MODELS["vit"]()).bfloat16()
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    arrays = checkpoints.read(tmp_path / "model.safetensors")
    kernel = made.state_dict()["head.weight"].float().numpy().T
    found = arrays["head/kernel"].astype("float32")
    np.testing.assert_array_equal(found, kernel)


@once
def test_arrays_that_do_not_fit(tmp_path):
    """Nothing has changed then."""
    _, file = written("vit", tmp_path)
    config = checkpoints.vmoe_config(file)
    for changes, words in (
        ({"activation": "gelu_tanh"}, "'gelu'. Received: activation='gelu_t"),
        ({"num_layers": 3}, "Missing in the file: Encoder/encoderblock_2/"),
        (
            {"moe": {"layers": [1], "num_experts": 2}},
            "Not in the model: .*encoderblock_1/Mlp",
        ),
    ):
        ours = models.ViTMoE(**{**config, **changes})
        before = ours.get_weights()
        with pytest.raises(ValueError, match=words):
            checkpoints.load(ours, file)
        for old, new in zip(before, ours.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    more = {"mlp_tokens": torch.zeros(3), "mask_token": torch.zeros(1, 128)}
    _, file = written("dinov2", tmp_path, **more)
    ours = models.ViTMoE(**checkpoints.vmoe_config(file))
    with pytest.raises(ValueError, match=r"Not in the model: mlp_tokens \(3,"):
        checkpoints.load(ours, file)
    more = {"stem.0.weight": torch.zeros(1)}
    _, file = written("dinov2", tmp_path, **more)
    words = "nearest to a ViT of timm or DINO"
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(file)
    _, file = written("convnext of timm", tmp_path)
    with pytest.raises(TypeError, match="must be a ConvNeXtMoE"):
        checkpoints.load(ours, file)
    sparse = models.ConvNeXtMoE(
        *BLOCKS.values(), num_classes=10, image_size=64,
        moe={"layers": [4], "num_experts": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be dense.*models.upcycle"):
        checkpoints.load(sparse, file)


def header_of(entries, size=64):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


ARRAY = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


@once
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 7,
        (2**60).to_bytes(8, "little") + b"{}",
        (10**6).to_bytes(8, "little") + b"{}" + bytes(100),
        header_of({"a": ARRAY, "b": {**ARRAY, "data_offsets": [16, 48]}}),
        header_of({"a": {**ARRAY, "data_offsets": [0, 99]}}),
        header_of({"a": {**ARRAY, "dtype": "Q8"}}),
        header_of({"a": ARRAY}, size=3),
        header_of([1, 2]),
    ],
)
def test_damaged_files(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match="whole safetensors"):
        checkpoints.read(file)


@once
def test_a_file_cut_anywhere(tmp_path):
    _, file = written("vit", tmp_path)
    content = file.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(checkpoints.CheckpointError, match="Received: /"):
            checkpoints.read(file)


class Program:
    """What a pickle could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@once
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_is_not_opened(tmp_path, old):
    file, made = tmp_path / "model.pth", tmp_path / "made"
    options = {"_use_new_zipfile_serialization": not old}
    torch.save({"a": Program(made)}, file, **options)
    for name in ("model.pth", "model.npz", "model.safetensors"):
        file = file.rename(tmp_path / name)
        with pytest.raises(checkpoints.CheckpointError, match="be a pickle"):
            checkpoints.read(file)
    assert not made.exists()

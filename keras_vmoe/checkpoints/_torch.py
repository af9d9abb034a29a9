"""Weights of PyTorch's vision models, in safetensors files, by our names.

timm's `vit_*`, `deit3_*` and `vit_*_dinov2`, the DINOv2 of Transformers, and
the ConvNeXt of timm, of torchvision and of its authors.
"""

import json
import re

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._warnings import warn
from keras_vmoe.checkpoints.assignment import POSITIONS
from keras_vmoe.checkpoints.files import CheckpointError

BLOCK = "Encoder/encoderblock_{}"
# Layers with a weight and a bias: their name, ours, and the order of the
# weight's axes here. Where a name has stage and block, ours count all blocks.
DENSE, CONV, DEPTHWISE, NORM = (1, 0), (2, 3, 1, 0), (2, 3, 0, 1), (0,)
VIT = (
    (r"patch_embed\.proj", "embedding", CONV),
    (r"blocks\.(\d+)\.norm1", f"{BLOCK}/LayerNorm_0", NORM),
    (r"blocks\.(\d+)\.norm2", f"{BLOCK}/LayerNorm_1", NORM),
    (r"blocks\.(\d+)\.mlp\.fc1", f"{BLOCK}/Mlp/Dense_0", DENSE),
    (r"blocks\.(\d+)\.mlp\.fc2", f"{BLOCK}/Mlp/Dense_1", DENSE),
    (r"norm", "Encoder/encoder_norm", NORM),
    (r"head", "head", DENSE),
)
TIMM = (
    (r"stem\.0", "stem", CONV),
    (r"stem\.1", "stem_norm", NORM),
    (r"stages\.(\d)\.downsample\.0", "downsample_{}_norm", NORM),
    (r"stages\.(\d)\.downsample\.1", "downsample_{}", CONV),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", "block_{}_conv", DEPTHWISE),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm", "block_{}_norm", NORM),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc1", "block_{}_hidden", DENSE),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc2", "block_{}_output", DENSE),
    (r"head\.norm", "norm", NORM),
    (r"head\.fc", "head", DENSE),
)
TORCHVISION = (
    (r"features\.0\.0", "stem", CONV),
    (r"features\.0\.1", "stem_norm", NORM),
    (r"features\.(\d)\.0", "downsample_{}_norm", NORM),
    (r"features\.(\d)\.1", "downsample_{}", CONV),
    (r"features\.(\d)\.(\d+)\.block\.0", "block_{}_conv", DEPTHWISE),
    (r"features\.(\d)\.(\d+)\.block\.2", "block_{}_norm", NORM),
    (r"features\.(\d)\.(\d+)\.block\.3", "block_{}_hidden", DENSE),
    (r"features\.(\d)\.(\d+)\.block\.5", "block_{}_output", DENSE),
    (r"classifier\.0", "norm", NORM),
    (r"classifier\.2", "head", DENSE),
)
AUTHORS = (
    (r"downsample_layers\.0\.0", "stem", CONV),
    (r"downsample_layers\.0\.1", "stem_norm", NORM),
    (r"downsample_layers\.(\d)\.0", "downsample_{}_norm", NORM),
    (r"downsample_layers\.(\d)\.1", "downsample_{}", CONV),
    (r"stages\.(\d)\.(\d+)\.dwconv", "block_{}_conv", DEPTHWISE),
    (r"stages\.(\d)\.(\d+)\.norm", "block_{}_norm", NORM),
    (r"stages\.(\d)\.(\d+)\.pwconv1", "block_{}_hidden", DENSE),
    (r"stages\.(\d)\.(\d+)\.pwconv2", "block_{}_output", DENSE),
    (r"norm", "norm", NORM),
    (r"head", "head", DENSE),
)
# Transformers' names of DINOv2's arrays, and timm's.
TRANSFORMERS = (
    (r"(?:dinov2|backbone)\.", ""),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (
        r"encoder\.layer\.(\d+)\.attention\.output\.dense",
        r"blocks.\1.attn.proj",
    ),
    (
        r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1",
        r"blocks.\1.ls\2.gamma",
    ),
    (r"encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)", r"blocks.\1.\2"),
    (r"layernorm\.", "norm."),
)
OF_TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"
# By a name that only they have.
FAMILIES = {
    "patch_embed.proj.weight": VIT,
    "stem.0.weight": TIMM,
    "features.0.0.weight": TORCHVISION,
    "downsample_layers.0.0.weight": AUTHORS,
}
TOKENS = {
    "cls_token": "cls", "pos_embed": POSITIONS, "reg_token": "registers",
    "register_tokens": "registers",
}  # fmt: skip
SCALES = {
    r"blocks\.(\d+)\.(?:ls1\.gamma|gamma_1)": "block_{}_attention_scale/scale",
    r"blocks\.(\d+)\.(?:ls2\.gamma|gamma_2)": "block_{}_mlp_scale/scale",
}
OF_CONVNEXT = (
    r"(?:stages|features)\.(\d)\.(?:blocks\.)?(\d+)\.(?:gamma|layer_scale)"
)
UNUSED = ("mask_token",)  # Of DINOv2's training.
# What other programs put before all names.
PREFIXES = ("module.", "model.", "backbone.")
XXLARGE = 384  # Features of the first stage of a ConvNeXt-XXL.
# Features of an attention head, which no shape gives: all but ViT-H, SO400M,
# -g, -G and giants. `load` takes the model's.
HEAD_DIM = 64
OTHER_HEAD_DIMS = {1152: 72, 1280: 80, 1408: 88, 1664: 104}
# Keys of timm's `config.json`, and ours.
BESIDE = {"interpolation": "interpolation", "crop_pct": "test_crop"}


class TorchArrays(dict):
    """Arrays by our names, and facts about their model.

    Attributes:
        arguments: Arguments of the model that no shape gives.
        preprocessing: Dict of the known attributes of a `Preprocessing`.
        of_class: Whether the class token has a position.
    """

    def __init__(self, arrays, arguments, preprocessing, of_class=True):
        super().__init__(arrays)
        self.arguments, self.preprocessing = arguments, preprocessing
        self.of_class = of_class

    @property
    def family(self):
        """`"vit"` or `"convnext"`."""
        return "convnext" if "stem/kernel" in self else "vit"

    @property
    def is_gated(self):
        """Whether the MLPs are SwiGLU, which our models do not have."""
        mlp = f"{BLOCK.format(0)}/Mlp/Dense_"
        first, second = (np.shape(self.get(f"{mlp}{i}/kernel")) for i in (0, 1))
        return bool(first and second) and first[1:] == (2 * second[0],)

    def with_heads(self, num_heads):
        """Returns the arrays with attention split into `num_heads` heads."""
        found = dict(self)
        for name, x in self.items():
            if "/SelfAttention/" in name and x.ndim > 1:
                shape = (num_heads, -1)  # Of biases.
                if name.endswith("out/kernel"):
                    shape = (num_heads, -1, x.shape[-1])
                elif name.endswith("kernel"):
                    shape = (x.shape[0], num_heads, -1)
                if x.shape[-2] * x.shape[-1] % num_heads == 0:
                    found[name] = x.reshape(shape)
        return TorchArrays(
            found, self.arguments, self.preprocessing, self.of_class
        )


def read_safetensors(path):
    """The arrays of a local safetensors file as `TorchArrays`."""
    safetensors = require("safetensors", "checkpoints")
    require("safetensors.numpy", "checkpoints")
    try:
        arrays = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise
    except (
        *(safetensors.SafetensorError, OSError, KeyError),
        AttributeError,  # A dtype that numpy does not have.
    ) as error:
        raise CheckpointError(
            "The checkpoint must be a whole safetensors file. "
            f"Received: {path} ({error}). Copy or download it again."
        ) from error
    return by_our_names(arrays, path, _beside(path))


def by_our_names(arrays, path, preprocessing=None):
    """Renames a PyTorch model's arrays to ours; others keep their names.

    Args:
        arrays: Dict of numpy arrays.
        path: Path of their file, for messages.
        preprocessing: Dict of its known attributes.
    """
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in arrays):
            arrays = {k.removeprefix(prefix): x for k, x in arrays.items()}
    if any(name.endswith(OF_TRANSFORMERS) for name in arrays):
        arrays = _by_timms_names(arrays)
    found = [table for name, table in FAMILIES.items() if name in arrays]
    if len(found) != 1:
        raise CheckpointError(_unknown(arrays, path))
    (table,) = found
    _check_kind(arrays, table, path)
    starts, ours, name = _starts(arrays), {}, None
    try:
        for name, x in arrays.items():
            if name not in UNUSED:
                ours |= _renamed(name, x, table, starts)
    except (  # Of another rank, or not in 3.
        *(ValueError, IndexError),
        TypeError,
    ) as error:
        raise CheckpointError(
            "The arrays must have the shapes of such a model. "
            f"Received: {path}, with {name} {arrays[name].shape}. Take the "
            "weights as they were published."
        ) from error
    imagenet = vars(Preprocessing.imagenet())
    known = {k: imagenet[k] for k in ("mean", "std")}
    scale = any("_scale" in name for name in ours)
    preprocessing = preprocessing or {}
    if table is VIT and not scale:
        known = {}  # Augreg's or DeiT's: the arrays do not say.
        if "mean" not in preprocessing:
            warn(
                f"{path} does not say how images are normalized: mean and std "
                "127.5 are assumed, as in timm's augreg. Put its config.json "
                "beside it, or set `model.preprocessing`."
            )
    arguments = {"activation": "gelu"}
    if scale:
        arguments["layer_scale_init_value"] = 1e-5
    # Not with registers, nor in DeiT III. DINOv2, which also has a layer scale,
    # has patches of 14 pixels; of DeiT III's models only ViT-H does.
    shape = np.shape(ours.get("embedding/kernel"))
    of_dinov2 = shape[:1] == (14,) and shape[-1] != 1280
    of_class = (of_dinov2 or not scale) and "registers" not in ours
    return TorchArrays(ours, arguments, {**known, **preprocessing}, of_class)


def _by_timms_names(arrays):
    """DINOv2's arrays by timm's names, from Transformers'."""
    found = {}
    for name, x in arrays.items():
        for pattern, theirs in TRANSFORMERS:
            name = re.sub(rf"^{pattern}", theirs, name)
        found[name] = x
    start = r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)"
    for match in filter(None, [re.fullmatch(start, x) for x in found]):
        names = [
            match[0].replace("query", x) for x in ("query", "key", "value")
        ]
        if all(name in found for name in names):
            parts = [found.pop(name) for name in names]
            found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = np.concatenate(
                parts
            )
    return found


def _renamed(name, x, table, starts):
    """One of PyTorch's arrays as a dict of ours."""
    qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
    if qkv:
        return _query_key_value(qkv[1], x)
    out = re.fullmatch(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", name)
    if out:
        start = f"{BLOCK.format(out[1])}/SelfAttention/out"
        if out[2] == "bias":
            return {f"{start}/bias": x}
        return {f"{start}/kernel": x.T.reshape(-1, _head_dim(x), len(x))}
    if table is VIT and name in TOKENS:
        if x.ndim != 3:
            raise ValueError("(1, tokens, features)")
        return {TOKENS[name]: x}
    for pattern, ours in SCALES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return {ours.format(match[1]): x}
    match = re.fullmatch(OF_CONVNEXT, name)
    if match:
        return {f"block_{_number(match, starts)}_scale": x.reshape(-1)}
    for pattern, ours, axes in table:
        match = re.fullmatch(rf"{pattern}\.(weight|bias)", name)
        if match:
            return weight_or_bias(match, ours, axes, x, starts)
    return {name: x}


def weight_or_bias(match, ours, axes, x, starts):
    """The weight or bias of one of our layers."""
    numbers = match.groups()[:-1]
    if ours.startswith("block"):
        numbers = (_number(match, starts),)
    elif ours.startswith("downsample") and "features" in match.re.pattern:
        numbers = (int(numbers[0]) // 2,)
    name = ours.format(*numbers)
    if match.groups()[-1] == "bias":
        return {f"{name}/bias": x}
    if axes == DENSE and x.ndim == 4:  # A convolution of single pixels.
        x = x.reshape(x.shape[:2])
    kind = "scale" if axes == NORM else "kernel"
    fits = x.ndim == len(axes)
    return {f"{name}/{kind}": x.transpose(axes) if fits else x}


def _query_key_value(block, x):
    """The three projections that PyTorch keeps as one."""
    found = {}
    for part, y in zip(("query", "key", "value"), np.split(x, 3), strict=True):
        name = f"{BLOCK.format(block)}/SelfAttention/{part}"
        if y.ndim == 1:
            found[f"{name}/bias"] = y.reshape(-1, _head_dim(y))
        else:
            found[f"{name}/kernel"] = y.T.reshape(len(y), -1, _head_dim(y))
    return found


def _head_dim(x):
    """Features of a head, of an array over all of them."""
    return OTHER_HEAD_DIMS.get(len(x), HEAD_DIM)


def _starts(arrays):
    """The number of the first block of each stage of a ConvNeXt."""
    pattern = r"(?:stages|features)\.(\d)\.(?:blocks\.)?(\d+)\.(?!weight|bias)"
    stages = {}
    for name in arrays:
        match = re.match(pattern, name)
        if match:
            blocks = stages.setdefault(int(match[1]), set())
            blocks.add(int(match[2]))
    starts, count = {}, 0
    for stage in sorted(stages):
        starts[stage] = count
        count += len(stages[stage])
    return starts


def _number(match, starts):
    """The number of a block through all stages."""
    return starts[int(match[1])] + int(match[2])


def _check_kind(arrays, table, path):
    """Raises for a model that has more than our arrays."""
    wrong = None
    if table is VIT and "pos_embed" not in arrays:
        wrong = "a ViT without learned positions (such as of rotary ones)"
    stem = next(name for name in FAMILIES if name in arrays)
    if table is not VIT and np.shape(arrays[stem])[:1] == (XXLARGE,):
        wrong = "a ConvNeXt-XXL, whose norms have another epsilon"
    if wrong:
        raise CheckpointError(
            "The arrays must fully define a ViTMoE or a ConvNeXtMoE. "
            f"Received: {path}, {wrong}. Take the weights of another model."
        )


def _beside(path):
    """The preprocessing in timm's `config.json` beside a file."""
    file = path.with_name("config.json")
    try:
        config = json.loads(file.read_text())["pretrained_cfg"]
        found = {x: [255.0 * y for y in config[x]] for x in ("mean", "std")}
        channels = len(found["mean"])
        Preprocessing.of(found, channels=channels)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    for theirs, ours in BESIDE.items():
        value = config.get(theirs)
        if value is None:
            continue
        try:
            Preprocessing.of({ours: value})
        except ValueError:
            warn(f"{file}: {theirs}={value!r} is unknown and ignored.")
        else:
            found[ours] = value
    return found


def _unknown(arrays, path):
    """The message for arrays of no known family."""
    kinds = {
        "a ViT of timm or DINOv2 of Transformers": VIT,
        "a ConvNeXt of timm": TIMM,
        "a ConvNeXt of torchvision": TORCHVISION,
        "a ConvNeXt of its authors": AUTHORS,
    }  # fmt: skip

    def likeness(table):
        patterns = [rf"{pattern}\.(weight|bias)" for pattern, *_ in table]
        return sum(any(re.fullmatch(p, n) for p in patterns) for n in arrays)

    nearest = max(kinds, key=lambda kind: likeness(kinds[kind]))
    return (
        f"The arrays must be those of one of: {', '.join(kinds)}. Received: "
        f"{path}, with {len(arrays)} arrays, nearest to {nearest}; the first "
        f"are {list(arrays)[:5]}. Take the weights of such a model."
    )

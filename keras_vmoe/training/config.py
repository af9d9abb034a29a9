"""What a training run needs to know, as one typed value."""

import dataclasses
import math
from typing import Literal

from keras_vmoe.models import MoEConfig


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The dense part of a `ViTMoE`; attributes are its arguments.

    Attributes:
        image_size: Side of the images in pixels; others are resized.
        patch_size: Side of a patch in pixels.
        hidden_dim: Features of a token.
        num_layers: Encoder blocks.
        num_heads: Attention heads.
        mlp_dim: Hidden features of the MLPs and experts.
        pooling: How tokens become one vector.
        position_embedding: Learned positions, or fixed sines and cosines.
        representation_size: Features of an extra tanh layer before the head;
            null leaves it out.
        dropout: Dropout rate.
        drop_path: Probability of dropping a residual branch in the last block.
        layer_scale: Starting value of the layer scale; null leaves it out.
        dtype: Dtype policy of the layers.
    """

    image_size: int = 32
    patch_size: int = 8
    hidden_dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 128
    pooling: Literal["token", "gap", "map"] = "gap"
    position_embedding: Literal["learned", "sincos2d"] = "learned"
    representation_size: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults train a V-MoE on the embedded digits.

    Attributes:
        run_dir: Folder that the run writes into; must be new or empty.
        backend: Keras backend; null leaves the choice to Keras.
        dataset: Name of a TFDS image-classification dataset, or "digits".
        data_dir: Folder of the prepared dataset; null means TFDS's default
            (for "digits" the user's cache folder).
        train_split: TFDS split to train on, such as "train[:90%]".
        validation_split: TFDS split to watch while training.
        test_split: TFDS split to measure once, at the end.
        num_classes: Classes of a dataset whose labels are plain integers; null
            for one that knows them.
        random_crop_padding: Pixels of padding before a random crop of the
            training images; 0 leaves them as they are.
        batch_size: Images per training step.
        epochs: Passes over the training split.
        learning_rate: Peak learning rate of AdamW, reached after the warm-up;
            from there a cosine leads to 0.
        warmup: Share of the training steps that is linear warm-up, in [0, 1).
        weight_decay: Decoupled weight decay of AdamW, on the kernels of all
            layers and experts and on learned positions; not on biases, norms,
            the class token, the layer scale and the attention pooling's probe.
        seed: Makes a run repeatable on one machine and backend.
        model: The model's size.
        moe: Its MoE layers; null trains the dense twin.
    """

    run_dir: str = "runs/digits"
    backend: Literal["jax", "tensorflow", "torch"] | None = None
    dataset: str = "digits"
    data_dir: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    num_classes: int | None = None
    random_crop_padding: int = 3
    batch_size: int = 64
    epochs: int = 60
    learning_rate: float = 2e-3
    warmup: float = 1 / 12
    weight_decay: float = 0.3
    seed: int = 0
    model: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    moe: MoEConfig | None = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self):
        for name in ("batch_size", "epochs", "learning_rate"):
            self._check(name, getattr(self, name) > 0, "positive")
        for name in ("weight_decay", "random_crop_padding"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        seed = 0 <= self.seed < 2**32
        self._check("seed", seed, "at least 0 and below 2**32")

    def _check(self, name, good, words):
        value = getattr(self, name)
        if not good or not math.isfinite(value):
            raise ValueError(
                f"`{name}` must be {words}. Received: {name}={value}. "
                f"The default is {getattr(type(self), name)}."
            )

"""What a training run needs to know, as one typed value."""

import dataclasses
import math
import typing
from typing import Literal

from keras_vmoe._checks import check_sizes
from keras_vmoe.data import Augmentation
from keras_vmoe.models import MoEConfig
from keras_vmoe.models.presets import find_preset
from keras_vmoe.routing.groups import check_capacity_factor

DEFAULT_IMAGE_SIZE = 32
DEFAULT_WARMUP = 1 / 12  # Of all steps, where no warm-up is set.
WARMUPS = ("warmup", "warmup_epochs", "warmup_steps")
INTEGERS = (
    "batch_size",
    "epochs",
    "accumulate",
    "checkpoints_per_epoch",
    "keep_checkpoints",
    "warmup_steps",
    "num_classes",
    "expert_shards",
)
# What a preset takes from the model's settings.
SHARED = ("image_size", "drop_path", "dtype")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The dense part of a `ViTMoE`; attributes are its arguments.

    Attributes:
        image_size: Side of the images in pixels; others are resized. null is
            that of the preset, or 32.
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

    image_size: int | None = None
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
class ConvNeXtConfig:
    """The dense part of a `ConvNeXtMoE`; attributes are its arguments.

    Attributes:
        depths: Blocks of each stage.
        dims: Features of each stage.
        patch_size: Side of a patch of the stem in pixels.
        isotropic: Whether there is one stage, without steps between.
        mlp_ratio: Hidden features of the MLPs, as a multiple of the stage's.
        layer_scale: Starting value of the layer scale; null leaves it out.
    """

    depths: tuple[int, ...] = (2, 2, 2)
    dims: tuple[int, ...] = (32, 64, 128)
    patch_size: int = 2
    isotropic: bool = False
    mlp_ratio: int = 4
    layer_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults train a V-MoE on the embedded digits.

    Attributes:
        run_dir: Folder that the run writes into: a new or empty one, or that
            of a run with the same settings that was stopped, which is resumed.
        backend: Keras backend; null leaves the choice to Keras.
        dataset: Name of a TFDS image-classification dataset, or "digits".
        data_dir: Folder of the prepared dataset; null means TFDS's default
            (for "digits" the user's cache folder). With the dataset
            "image_folder" the images themselves, as
            `data_dir/split/class/image.jpg`.
        train_split: TFDS split to train on, such as "train[:90%]".
        validation_split: TFDS split to watch while training.
        test_split: TFDS split to measure once, at the end.
        num_classes: Classes of a dataset whose labels are plain integers; null
            for one that knows them.
        skip_corrupt: Whether to skip damaged records and images that cannot be
            decoded, with a warning that names them, instead of an error.
        class_weights: How often an image of each class is drawn for training,
            against the others; null draws all alike.
        augmentation: What happens to the training images.
        test_crop: Share of the shorter side that the centre crop of evaluation
            keeps; null resizes the whole image.
        batch_size: Images per training step.
        epochs: Passes over the training split.
        loss: Cross-entropy over the classes, or a binary one for each class:
            their mean ("bce") or their sum ("sigmoid", V-MoE's).
        label_smoothing: Share of the label's 1 that all classes get, in [0, 1).
        optimizer: AdamW, LAMB or SGD with momentum 0.9.
        learning_rate: Peak learning rate, reached after the warm-up.
        schedule: How the learning rate falls from there.
        final_learning_rate: Where a cosine or linear schedule ends.
        warmup: Share of the training steps that is linear warm-up, in [0, 1).
            Where none of the three is set, a twelfth.
        warmup_epochs: Epochs of it instead, which stay as many when `epochs`
            changes.
        warmup_steps: Updates of it instead.
        weight_decay: Decoupled weight decay of the kernels of all layers; not
            of biases, norms, the class token, the layer scale and the
            attention pooling's probe.
        expert_weight_decay: That of the experts' kernels; null means the same.
        decay_positions: Whether learned positions are decayed as well.
        decay_gates: Whether the routers' kernels are decayed as well.
        clip_norm: Largest norm of all gradients together; null clips nothing.
        accumulate: Steps whose gradients are added up for one update.
        ema: Momentum of an exponential moving average of the weights, which
            the saved model then has; null for none.
        init: Weights to start from: a .keras file, or a checkpoint of the
            reference program, see `keras-vmoe convert`. The head starts anew
            where the classes differ, positions are resized.
        head_bias: Starting value of the head's bias.
        freeze: What is not trained: the routers, or all but the head.
        checkpoints_per_epoch: Into how many parts a long pass over the images
            is cut. The logs' epochs, with validation and a checkpoint at each
            end, are then these parts.
        keep_checkpoints: How many checkpoints to keep until the run is
            finished.
        tensorboard: Whether to write logs for TensorBoard into the run folder.
        distribution: How a run is spread over several devices, see
            `distribution.resolve`; null uses one. Validation then leaves a last
            batch out that is not full.
        expert_shards: Over how many devices "expert_parallel" spreads the
            experts; null takes as many as divide them.
        shard_dense: Whether "expert_parallel" spreads the dense kernels, too.
        seed: Makes a run repeatable on one machine and backend.
        preset: One of the papers' models, see `keras-vmoe presets`, in the
            place of `model`, whose image size, drop path and dtype it takes.
        capacity_factor: That of the MoE layers, if there are any; null leaves
            it as it is.
        model: The size of a ViT.
        convnext: That of a ConvNeXt in the ViT's place, which takes the image
            size, drop path and dtype of `model`.
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
    skip_corrupt: bool = False
    class_weights: tuple[float, ...] | None = None
    augmentation: Augmentation = dataclasses.field(
        default_factory=lambda: Augmentation(crop_padding=3)
    )
    test_crop: float | None = None
    batch_size: int = 64
    epochs: int = 60
    loss: Literal["ce", "bce", "sigmoid"] = "ce"
    label_smoothing: float = 0.0
    optimizer: Literal["adamw", "lamb", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    final_learning_rate: float = 0.0
    warmup: float | None = None
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.3
    expert_weight_decay: float | None = None
    decay_positions: bool = True
    decay_gates: bool = True
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    init: str | None = None
    head_bias: float = 0.0
    freeze: Literal["routers", "backbone"] | None = None
    checkpoints_per_epoch: int = 1
    keep_checkpoints: int = 2
    tensorboard: bool = False
    distribution: (
        Literal["auto", "data_parallel", "expert_parallel", "mirrored", "tpu"]
        | None
    ) = None
    expert_shards: int | None = None
    shard_dense: bool = False
    seed: int = 0
    preset: str | None = None
    capacity_factor: float | None = None
    model: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    convnext: ConvNeXtConfig | None = None
    moe: MoEConfig | None = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self):
        self._check_choices()
        for name in INTEGERS:
            value = getattr(self, name)
            if value is not None:
                check_sizes(**{name: value})
        self._check("learning_rate", self.learning_rate > 0, "positive")
        if self.capacity_factor is not None:
            check_capacity_factor(self.capacity_factor)
        for name in ("weight_decay", "final_learning_rate"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("head_bias", True, "a number")
        smoothing = 0 <= self.label_smoothing < 1
        self._check("label_smoothing", smoothing, "at least 0 and below 1")
        self._check_warmup()
        for name, good in (
            ("expert_weight_decay", lambda x: x >= 0),
            ("clip_norm", lambda x: x > 0),
            ("ema", lambda x: 0 < x < 1),
            ("test_crop", lambda x: 0 < x <= 1),
        ):
            value = getattr(self, name)
            if value is not None:
                self._check(name, good(value), "null or in its range")
        if self.preset is not None:
            find_preset(self.preset)
            self._check_sizes("preset")
        elif self.convnext is not None:
            self._check_sizes("convnext")
        if self.label_smoothing and self.loss != "ce":
            raise ValueError(
                "Labels are smoothed over the classes of a cross-entropy. "
                f"Received: label_smoothing={self.label_smoothing} with "
                f"loss={self.loss!r}. Leave one of them out."
            )
        seed = 0 <= self.seed < 2**32
        self._check("seed", seed, "at least 0 and below 2**32")

    def warmup_of(self, steps):
        """Steps of the warm-up in a run.

        Args:
            steps: Steps of the whole run, as Keras counts them: also those
                that only add up their gradients.

        Returns:
            An integer.
        """
        if self.warmup_steps is not None:
            return self.warmup_steps * self.accumulate
        share = DEFAULT_WARMUP if self.warmup is None else self.warmup
        if self.warmup_epochs is not None:
            share = self.warmup_epochs / self.epochs
        return min(round(share * steps), steps - 1)

    def _check_warmup(self):
        """Raises unless one warm-up is set at most, and ends in time."""
        given = {name: getattr(self, name) for name in WARMUPS}
        given = {name: x for name, x in given.items() if x is not None}
        if len(given) > 1:
            received = ", ".join(f"{name}={x}" for name, x in given.items())
            raise ValueError(
                f"The warm-up must be set by one of {WARMUPS}. "
                f"Received: {received}. Set the others to null (a recipe sets "
                "one, too)."
            )
        if self.warmup is not None:
            good = 0 <= self.warmup < 1
            self._check("warmup", good, "at least 0 and below 1")
        if self.warmup_epochs is not None:
            good = 0 <= self.warmup_epochs < self.epochs
            words = f"at least 0 and below epochs={self.epochs}"
            self._check("warmup_epochs", good, words)

    def _check_choices(self):
        """Raises if a setting is none of the words that it may be."""
        for name, kind in typing.get_type_hints(type(self)).items():
            words = [
                word
                for part in (kind, *typing.get_args(kind))
                if typing.get_origin(part) is Literal
                for word in typing.get_args(part)
            ]
            value = getattr(self, name)
            is_null = value is None and type(None) in typing.get_args(kind)
            if words and not is_null and value not in words:
                raise ValueError(
                    f"`{name}` must be one of {words}. "
                    f"Received: {name}={value!r}. "
                    f"The default is {getattr(type(self), name)!r}."
                )

    @property
    def image_size(self):
        """Side of the images in pixels."""
        default = DEFAULT_IMAGE_SIZE
        if self.preset is not None:
            default = find_preset(self.preset).arguments.get("image_size", 224)
        return self.model.image_size or default

    def _check_sizes(self, what):
        """Raises if sizes of a ViT are set that will not be used.

        Args:
            what: The setting that has sizes of its own.
        """
        here, default = (
            dataclasses.asdict(model) for model in (self.model, ViTConfig())
        )
        changed = [
            f"model.{name}={value!r}"
            for name, value in here.items()
            if value != default[name] and name not in SHARED
        ]
        if what == "preset" and self.moe != MoEConfig():
            changed.append(f"moe={self.moe!r}")
        if what == "preset" and self.convnext is not None:
            changed.append(f"convnext={self.convnext!r}")
        if changed:
            raise ValueError(
                f"A {what} has its own sizes. Received: {', '.join(changed)} "
                f"with {what}={getattr(self, what)!r}. Leave one of them out; "
                "the dense twin of a preset is a preset as well."
            )

    def _check(self, name, good, words):
        value = getattr(self, name)
        if not good or not math.isfinite(value):
            raise ValueError(
                f"`{name}` must be {words}. Received: {name}={value}. "
                f"The default is {getattr(type(self), name)}."
            )

"""The configuration of a training run, as one typed value."""

import dataclasses
from typing import TYPE_CHECKING
from typing import Literal

from keras_vmoe import _checks
from keras_vmoe.models import MoEConfig
from keras_vmoe.models.presets import find_preset
from keras_vmoe.routing._groups import check_capacity_factor
from keras_vmoe.training import typed
from keras_vmoe.training.reading import DataConfig
from keras_vmoe.training.sizes import VIT_SIZES
from keras_vmoe.training.sizes import ConvNeXtConfig
from keras_vmoe.training.sizes import MoESettings
from keras_vmoe.training.sizes import SwinConfig
from keras_vmoe.training.sizes import family_of
from keras_vmoe.training.sizes import given

# The command line parses the first; Python may also give the second.
if TYPE_CHECKING:
    MoE = MoESettings | MoEConfig
else:
    MoE = MoESettings
DEFAULT_IMAGE_SIZE = 32
DEFAULT_WARMUP = 1 / 12  # Share of all steps.
KINDS = {"vit": "ViT", "convnext": "ConvNeXt", "swin": "Swin"}
WARMUPS = ("warmup", "warmup_epochs", "warmup_steps")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dense part of the model: a preset, or the sizes of a `ViTMoE`.

    A size that is None comes from the file to start from (`init`), else the
    preset, else the default.

    Attributes:
        preset: Model of a paper; see `keras-vmoe presets`.
        family: Accept models of this family only.
        image_size: Pixels; default: the preset's, or 32.
        init: Pretrained weights: .keras, run, checkpoint.
        needs_init: Require init.
        upcycle: Make experts of the MLPs or experts of init.
        freeze: Part that is not trained.
        head_bias: Initial value of the head's bias.
        capacity_factor: Experts'; default: the model's.
        drop_path_rate: Last block's rate, or dict by preset.
        patch_size: Side of a patch, in pixels.
        hidden_dim: Features of a token.
        num_layers: Encoder blocks.
        num_heads: Attention heads.
        mlp_dim: Hidden features of MLPs and experts.
        pooling: Class token, mean, or attention.
        position_embedding: Learned or fixed positions.
        representation_size: Features of a tanh layer before the head.
        num_registers: Tokens behind the class token; default: none.
        qk_norm: Normalize queries and keys.
        ensemble_size: Members of an ensemble; default: none.
        dropout: Dropout rate.
        layer_scale_init_value: Initial layer scale; default: none.
        activation: Of MLPs and experts.
        dtype: Policy.
        remat: Recompute blocks instead of storing them.
    """

    preset: str | None = None
    family: Literal["vit", "convnext", "swin"] | None = None
    image_size: int | None = None
    init: str | None = None
    needs_init: bool = False
    upcycle: bool = False
    freeze: Literal["routers", "backbone"] | None = None
    head_bias: float = 0.0
    capacity_factor: float | Literal["dropless"] | None = None
    drop_path_rate: float | dict[str, float] = 0.0
    patch_size: int | None = None
    hidden_dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    pooling: Literal["token", "gap", "map"] | None = None
    position_embedding: Literal["learned", "sincos2d"] | None = None
    representation_size: int | None = None
    num_registers: int | None = None
    qk_norm: bool | None = None
    ensemble_size: int | None = None
    dropout: float | None = None
    layer_scale_init_value: float | None = None
    activation: str | None = None
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        typed.check_types(self, "model.")
        if self.preset is not None:
            find_preset(self.preset)
        if self.upcycle and self.init is None:
            raise ValueError(
                "`upcycle` needs a model to start from. Received: upcycle=True "
                "with init=None. Set init, such as --init dense.keras."
            )
        if self.capacity_factor not in (None, "dropless"):
            check_capacity_factor(self.capacity_factor)
        good = _checks.is_number(self.head_bias)
        typed.check_value(good, self, "head_bias", "a finite number")
        rates = self.drop_path_rate
        for rate in rates.values() if isinstance(rates, dict) else [rates]:
            _checks.check_rates(drop_path_rate=rate)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Loss, optimizer and learning rate.

    Attributes:
        name: Optimizer; SGD has momentum 0.9.
        learning_rate: Peak, at the end of the warm-up.
        schedule: Decay.
        final_learning_rate: At the end of cosine or linear.
        warmup: Share of all steps; default: 1/12.
        warmup_epochs: Length in epochs instead.
        warmup_steps: Length in updates instead.
        weight_decay: Decoupled decay of kernels.
        expert_weight_decay: Of experts; default: the same.
        decay_positions: Decay learned positions too.
        decay_gates: Decay the routers' kernels too.
        clip_norm: Clip gradients to this global norm.
        accumulate: Steps of gradients per update.
        ema: Momentum of averaged weights; default: off.
        loss: Softmax, or mean or sum of sigmoids.
        label_smoothing: Share spread over all classes.
    """

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
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
    loss: Literal["ce", "bce", "sigmoid"] = "ce"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        typed.check_types(self, "optimizer.")
        typed.check_positive(self, "learning_rate", "clip_norm", "ema")
        _checks.check_not_negative(
            weight_decay=self.weight_decay,
            final_learning_rate=self.final_learning_rate,
            expert_weight_decay=self.expert_weight_decay or 0,
            warmup_epochs=self.warmup_epochs or 0,
        )
        _checks.check_rates(
            label_smoothing=self.label_smoothing,
            warmup=self.warmup or 0,
            ema=self.ema or 0,
        )
        lengths = {name: getattr(self, name) for name in WARMUPS}
        words = [f"{k}={x}" for k, x in lengths.items() if x is not None]
        if len(words) > 1:
            raise ValueError(
                f"The warm-up must be set by one of {WARMUPS}. "
                f"Received: {', '.join(words)}. Set the others, which may come "
                "from a recipe, to null."
            )
        if self.label_smoothing and self.loss != "ce":
            raise ValueError(
                "Label smoothing needs the softmax loss. "
                f"Received: label_smoothing={self.label_smoothing} with "
                f"loss={self.loss!r}. Set one of them only."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a stopped run is resumed.

    Attributes:
        checkpoints_per_epoch: Save this often per epoch.
        keep_checkpoints: Keep this many until the end.
    """

    checkpoints_per_epoch: int = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        typed.check_types(self, "checkpoint.")


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
    """Distribution over several devices.

    Attributes:
        distribution: Strategy.
        expert_shards: Devices that share the experts.
        shard_dense: Shard the dense kernels too.
    """

    distribution: (
        Literal["auto", "data_parallel", "expert_parallel", "mirrored", "tpu"]
        | None
    ) = None
    expert_shards: int | None = None
    shard_dense: bool = False

    def __post_init__(self) -> None:
        typed.check_types(self, "devices.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults train a V-MoE on the embedded digits.

    Attributes:
        run_dir: New, or a stopped run's.
        epochs: Passes over the training split.
        seed: Makes a run repeatable on one machine.
        backend: Keras backend.
        tensorboard: Write logs for TensorBoard.
        data: Images and batches.
        model: The dense part: a preset, or the sizes of a ViT (--model.help).
        convnext: ConvNeXt, not a ViT; see --convnext.help.
        swin: Swin, not a ViT; see --swin.help.
        moe: MoE layers; null: dense; see --moe.help.
        optimizer: Loss, optimizer and learning rate.
        checkpoint: Checkpoints, from which a stopped run is resumed.
        devices: Distribution over several devices.
    """

    run_dir: str = "runs/digits"
    epochs: int = 60
    seed: int = 0
    backend: Literal["jax", "tensorflow", "torch"] | None = None
    tensorboard: bool = False
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    convnext: ConvNeXtConfig | None = None
    swin: SwinConfig | None = None
    moe: MoE | None = MoESettings()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    devices: DevicesConfig = DevicesConfig()

    def __post_init__(self) -> None:
        if isinstance(self.moe, MoEConfig):  # All of it is set.
            settings = MoESettings(**vars(self.moe))
            object.__setattr__(self, "moe", settings)
        if self.moe is not None:
            MoEConfig.from_dict(given(self.moe))  # Raises for what is none.
        typed.check_types(self)
        good = _checks.is_integer(self.seed) and 0 <= self.seed < 2**32
        typed.check_value(good, self, "seed", "an integer from 0 to 2**32 - 1")
        warmup = self.optimizer.warmup_epochs
        if warmup is not None and warmup >= self.epochs:
            raise ValueError(
                f"`warmup_epochs` must be below epochs={self.epochs}. "
                f"Received: warmup_epochs={warmup}, which may be a recipe's. "
                f"Set it too, such as --warmup_epochs {self.epochs / 10:g}."
            )
        self._check_sizes()
        start_is_enough = self.model.init and not self.model.preset
        families = (None, self.family)
        if not start_is_enough and self.model.family not in families:
            raise ValueError(
                f"This recipe is for a {KINDS[self.model.family]}. Received: "
                f"a {KINDS[self.family]}. Name a preset of that family "
                "(`keras-vmoe presets`), or set `convnext.dims` and "
                "`convnext.depths` for a ConvNeXt, `swin.dims` for a Swin."
            )
        size = self.model.ensemble_size
        if size is not None and self.optimizer.loss != "ce":
            raise ValueError(
                "An ensemble outputs the log of a mean softmax. Received: "
                f"loss={self.optimizer.loss!r} with ensemble_size={size}. Set "
                "loss='ce'."
            )

    @property
    def family(self) -> Literal["vit", "convnext", "swin"]:
        """`"vit"`, `"convnext"` or `"swin"`."""
        preset = self.model.preset
        if preset is not None:
            return family_of(find_preset(preset).model)
        if self.convnext is not None:
            return "convnext"
        return "vit" if self.swin is None else "swin"

    @property
    def part(self) -> ModelConfig | ConvNeXtConfig | SwinConfig | None:
        """The settings of the family's sizes."""
        return {"convnext": self.convnext, "swin": self.swin}.get(
            self.family, self.model
        )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        default, preset = DEFAULT_IMAGE_SIZE, self.model.preset
        if preset is not None:
            default = find_preset(preset).arguments.get("image_size", 224)
        return self.model.image_size or default

    @property
    def drop_path_rate(self) -> float:
        """Rate of the last block, for this preset if rates differ by preset."""
        rate = self.model.drop_path_rate
        if isinstance(rate, dict):
            dense = (self.model.preset or "").partition("_e")[0]
            return rate.get(dense, 0.0)
        return rate

    def warmup_of(self, steps: int) -> int:
        """Returns the number of warm-up steps.

        Args:
            steps: Steps of the whole run, including steps that only
                accumulate gradients.

        Returns:
            An integer.
        """
        optimizer = self.optimizer
        if optimizer.warmup_steps is not None:
            return optimizer.warmup_steps * optimizer.accumulate
        share = DEFAULT_WARMUP
        if optimizer.warmup is not None:
            share = optimizer.warmup
        elif optimizer.warmup_epochs is not None:
            share = optimizer.warmup_epochs / self.epochs
        return min(round(share * steps), steps - 1)

    def _check_sizes(self):
        """Raises if sizes of another family are set."""
        kind = KINDS[self.family]
        sizes = {f"model.{x}": getattr(self.model, x) for x in VIT_SIZES}
        other = {"convnext": self.convnext, "swin": self.swin}
        other.pop(self.family, None)
        other |= {} if self.family == "vit" else sizes
        wrong = [f"{k}={x!r}" for k, x in other.items() if x is not None]
        if wrong:
            preset = self.model.preset
            words = f" with preset={preset!r}" if preset else ""
            raise ValueError(
                f"A {kind} has its own sizes. Received: {', '.join(wrong)}"
                f"{words}. Leave them out."
            )


# Groups whose names may be left out on the command line and in files.
GROUPS = ("data", "model", "optimizer", "checkpoint", "devices")

"""The papers' training recipes, and a small one, with their sources.

A recipe is a set of settings for `TrainConfig`. What depends on the model, the
drop path, is a table of its own in the recipe.
"""

import dataclasses
import difflib

from keras_vmoe.data import Augmentation
from keras_vmoe.training.config import ViTConfig

SWEET_SPOT = "Videau et al., 2024, arXiv:2411.18322, table of hyperparameters; "
DEIT = "peak learning rate of DeiT III, arXiv:2204.07118, table of recipes"
CONVNEXT = (
    "batch size and peak learning rate of ConvNeXt, arXiv:2201.03545, "
    "appendix A"
)
V_MOE = "Riquelme et al., 2021, arXiv:2106.05974, appendix"

THREE_AUGMENT = {"flip": True, "three_augment": True, "color_jitter": 0.3}
INCEPTION = (0.08, 1.0)
RAND_AUGMENT = {"rand_augment": 0.9, "rand_augment_layers": 2}
VIT_DROP_PATH_1K = {"vit_s16": 0.1, "vit_b16": 0.2}
VIT_DROP_PATH_21K = {"vit_s16": 0.0, "vit_b16": 0.1}
CONVNEXT_DROP_PATH_1K = {
    "convnext_t": 0.1,
    "convnext_s": 0.3,
    "convnext_b": 0.6,
    "convnext_iso_s": 0.1,
    "convnext_iso_b": 0.5,
}
CONVNEXT_DROP_PATH_21K = {
    "convnext_t": 0.0,
    "convnext_s": 0.0,
    "convnext_b": 0.1,
    "convnext_iso_s": 0.1,
    "convnext_iso_b": 0.5,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        source: Where the numbers are printed.
        epochs: Passes over the training images.
        batch_size: Images per update.
        optimizer: `"adamw"`, `"lamb"` or `"sgd"`.
        learning_rate: Peak learning rate.
        weight_decay: Of kernels.
        schedule: How the learning rate falls.
        final_learning_rate: Where the schedule ends.
        head_bias: Starting value of the head's bias.
        warmup_epochs: Epochs of linear warm-up; None where the source counts
            updates.
        warmup_steps: Updates of it instead.
        expert_weight_decay: Of the experts' kernels.
        augmentation: Of the training images.
        loss: `"ce"`, `"bce"` or `"sigmoid"`.
        label_smoothing: Share of the label that all classes get.
        test_crop: Share that the centre crop of evaluation keeps.
        decay_gates: Whether the routers' kernels are decayed.
        decay_positions: Whether learned positions are decayed.
        clip_norm: Largest norm of the gradients.
        capacity_factor: Of the MoE layers; None leaves the model's.
        drop_path: By the name of the dense preset.
        is_convnext: Whether it is for ConvNeXts, and not for ViTs.
    """

    source: str
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str = "cosine"
    final_learning_rate: float = 0.0
    head_bias: float = 0.0
    warmup_epochs: float | None = 0.0
    warmup_steps: int | None = None
    expert_weight_decay: float | None = None
    augmentation: Augmentation = Augmentation()
    loss: str = "ce"
    label_smoothing: float = 0.0
    test_crop: float | None = None
    decay_gates: bool = False
    decay_positions: bool = False
    clip_norm: float | None = None
    capacity_factor: float | None = None
    drop_path: dict = dataclasses.field(default_factory=dict)
    is_convnext: bool = False

    def check_model(self, config):
        """Raises unless a configuration's model is of the recipe's family."""
        is_convnext = config.convnext is not None
        if config.preset is not None:
            is_convnext = config.preset.startswith("convnext")
        if is_convnext != self.is_convnext:
            kinds = ("a ViT", "a ConvNeXt")
            raise ValueError(
                f"This recipe is for {kinds[self.is_convnext]}. Received: "
                f"{kinds[is_convnext]}. Name a preset of the family "
                "(`keras-vmoe presets`), or set `convnext.dims` and "
                "`convnext.depths` for a ConvNeXt."
            )

    def settings(self, preset=None):
        """The settings of a `TrainConfig`; the model is left to the user.

        Args:
            preset: Optional name of a preset, for what depends on the model.

        Returns:
            Dict of `TrainConfig`'s attributes; those of `model` under
            `"model"`.
        """
        names = (
            "epochs", "batch_size", "optimizer", "learning_rate",
            "weight_decay", "schedule", "expert_weight_decay", "augmentation",
            "loss", "label_smoothing", "test_crop", "clip_norm",
            "decay_gates", "capacity_factor", "final_learning_rate",
            "head_bias", "decay_positions", "warmup_epochs", "warmup_steps",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        dense = (preset or "").partition("_e")[0]
        if dense in self.drop_path:
            drop_path = self.drop_path[dense]
            settings["model"] = ViTConfig(drop_path=drop_path)
        return settings


def _v_moe(learning_rate, clip_norm=None):
    return Recipe(
        source=V_MOE + ": pre-training on ImageNet-21k; its program's "
        "pretrain_imagenet21k.py for the batch size, augmentation, loss, "
        "decay, last learning rate and the head's bias",
        epochs=300,
        batch_size=4096,
        optimizer="adamw",
        learning_rate=learning_rate,
        schedule="linear",
        warmup_epochs=None,
        warmup_steps=10_000,
        weight_decay=0.1,
        augmentation=Augmentation(
            crop_area=INCEPTION, flip=True, rand_augment=2.0,
            rand_augment_layers=2, mixup=0.5,
        ),
        loss="sigmoid",
        test_crop=0.875,
        decay_gates=True,
        final_learning_rate=1e-5,
        head_bias=-10.0,
        clip_norm=clip_norm,
    )  # fmt: skip


VIT_IN21K = Recipe(
    source=SWEET_SPOT + DEIT,
    epochs=90,
    batch_size=2048,
    optimizer="lamb",
    learning_rate=3e-3,
    weight_decay=0.02,
    expert_weight_decay=0.04,
    warmup_epochs=5,
    label_smoothing=0.1,
    augmentation=Augmentation(crop_area=INCEPTION, **THREE_AUGMENT, cutmix=1.0),
    test_crop=1.0,
    drop_path=VIT_DROP_PATH_21K,
)

RECIPES = {
    "sweet_spot_vit_in1k": Recipe(
        source=SWEET_SPOT + DEIT + "; the three repeats are those of DeiT's "
        "program, samplers.py",
        epochs=300,
        batch_size=2048,
        optimizer="lamb",
        learning_rate=3e-3,
        weight_decay=0.03,
        expert_weight_decay=0.06,
        warmup_epochs=5,
        augmentation=Augmentation(
            repeats=3, **THREE_AUGMENT, mixup=0.8, cutmix=1.0
        ),
        loss="bce",
        test_crop=1.0,
        drop_path=VIT_DROP_PATH_1K,
    ),
    "sweet_spot_vit_in21k": VIT_IN21K,
    "sweet_spot_convnext_in1k": Recipe(
        source=SWEET_SPOT + CONVNEXT,
        is_convnext=True,
        epochs=300,
        batch_size=4096,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        expert_weight_decay=0.05,
        warmup_epochs=20,
        label_smoothing=0.1,
        augmentation=Augmentation(
            flip=True, **RAND_AUGMENT, mixup=0.8, cutmix=1.0, erasing=0.25
        ),
        test_crop=0.875,
        drop_path=CONVNEXT_DROP_PATH_1K,
    ),
    "sweet_spot_convnext_in21k": Recipe(
        source=SWEET_SPOT + CONVNEXT,
        is_convnext=True,
        epochs=90,
        batch_size=4096,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        expert_weight_decay=0.05,
        warmup_epochs=5,
        label_smoothing=0.1,
        augmentation=Augmentation(
            crop_area=INCEPTION, flip=True, **RAND_AUGMENT, cutmix=1.0
        ),
        test_crop=0.875,
        drop_path=CONVNEXT_DROP_PATH_21K,
    ),
    "vmoe_s32_in21k": _v_moe(1e-3),
    "vmoe_b_in21k": _v_moe(8e-4),
    "vmoe_l32_in21k": _v_moe(6e-4),
    "vmoe_l16_in21k": _v_moe(4e-4),
    "vmoe_h14_in21k": _v_moe(3e-4, clip_norm=1.0),
    "vmoe_finetune": Recipe(
        source=V_MOE + ": fine-tuning (SGD with momentum, cosine, clipping, "
        "capacity factor); learning rate, epochs and batch size are not "
        "printed as one choice there: these are ours, not tuned",
        epochs=8,
        batch_size=512,
        optimizer="sgd",
        learning_rate=3e-3,
        weight_decay=0.0,
        augmentation=Augmentation(crop_area=INCEPTION, flip=True),
        clip_norm=10.0,
        capacity_factor=1.5,
    ),
    "sweet_spot_vit_finetune": dataclasses.replace(
        VIT_IN21K,
        source=SWEET_SPOT + "50 epochs; the rest is that of its pre-training, "
        "with a tenth of the learning rate, which is ours and not tuned",
        epochs=50,
        learning_rate=3e-4,
    ),
    "sweet_spot_convnext_finetune": Recipe(
        source=SWEET_SPOT + "30 epochs; the rest is that of ConvNeXt's "
        "fine-tuning, arXiv:2201.03545, appendix A, without its decay of the "
        "learning rate by layer and its average of the weights",
        is_convnext=True,
        epochs=30,
        batch_size=512,
        optimizer="adamw",
        learning_rate=5e-5,
        weight_decay=1e-8,
        label_smoothing=0.1,
        augmentation=Augmentation(
            crop_area=INCEPTION, flip=True, **RAND_AUGMENT, erasing=0.25
        ),
        test_crop=0.875,
        drop_path=CONVNEXT_DROP_PATH_21K,
    ),
    "digits_small": Recipe(
        source="tuned on the validation split of the embedded digits; "
        "benchmarks/digits.py",
        epochs=60,
        batch_size=64,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.3,
        warmup_epochs=5,
        augmentation=Augmentation(crop_padding=3),
        decay_gates=True,
        decay_positions=True,
    ),
    "cifar10_small": Recipe(
        source="the training of benchmarks/cifar10.py, which reads it here "
        "and has models of its own; the rate was chosen on train[90%:] (2e-3 "
        "against 4e-3), the rest was not tuned",
        epochs=6,
        batch_size=64,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup_epochs=0.6,
        augmentation=Augmentation(crop_padding=4, flip=True),
        clip_norm=1.0,
    ),
}


def find_recipe(name):
    """A recipe by its name.

    Args:
        name: One of `RECIPES`.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: If there is no such recipe; the message lists the nearest.

    Example:

    >>> find_recipe("sweet_spot_vit_in1k").optimizer
    'lamb'
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=3, cutoff=0.4)
        raise ValueError(
            f"The recipe must be one of {list(RECIPES)}. "
            f"Received: recipe={name!r}. The nearest: {near or 'none'}."
        )
    return RECIPES[name]

"""The plan of an evaluation or prediction, as text."""

from keras_vmoe import models
from keras_vmoe._extras import require


def describe(model, settings, num_images, batch_size):
    """The settings, cost and steps of an evaluation or prediction, as text.

    Args:
        model: A functional model of images.
        settings: Dict of plain values, the configuration.
        num_images: Images to look at.
        batch_size: Images of a step.

    Returns:
        String of several lines.

    Example:

    >>> model = models.ViTMoE(8, 4, 8, 2, 2, 8, num_classes=3, moe=None)
    >>> print(describe(model, {"split": "test"}, num_images=9, batch_size=4))
    split: test
    <BLANKLINE>
    parameters: 0.00 million, 0.00 million active per token
    multiply-adds per image: 0.0 million
    memory, estimated: 0 MiB for weights, 0 MiB for a batch
    classes: 3
    images: 9, in 3 steps
    """
    cost = models.cost(model)
    yaml = require("yaml", "cli")
    lines = [
        yaml.safe_dump(settings, sort_keys=False).rstrip(),
        "",
        *cost_lines(cost),
        f"memory, estimated: {4 * cost.params / 2**20:.0f} MiB for weights, "
        f"{cost.activation_bytes * batch_size / 2**20:.0f} MiB for a batch",
        f"classes: {model.output_shape[-1]}",
        f"images: {num_images}, in {-(-num_images // batch_size)} steps",
    ]
    return "\n".join(lines)


def cost_lines(cost):
    """Lines of text for a `models.Cost`: parameters and multiply-adds."""
    return [
        f"parameters: {cost.params / 1e6:.2f} million, "
        f"{cost.active_params / 1e6:.2f} million active per token",
        f"multiply-adds per image: {cost.flops / 1e6:,.1f} million",
    ]

"""A summary of an evaluation or prediction before it runs."""

from keras_vmoe import models
from keras_vmoe._extras import require


def describe(model, settings, num_images, batch_size):
    """The settings, cost and steps of an evaluation or prediction, as text."""
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
        f"multiply-adds per image: {cost.macs / 1e6:,.1f} million",
    ]

"""A summary of an evaluation or prediction before it runs."""

from keras_vmoe import models
from keras_vmoe._checks import counted
from keras_vmoe._extras import require


def describe(model, settings, num_images, batch_size):
    """The settings, cost and steps of an evaluation or prediction, as text."""
    cost = models.cost(model)
    yaml = require("yaml", "cli")
    lines = [
        yaml.safe_dump(settings, sort_keys=False).rstrip(),
        "",
        *cost_lines(cost),
        f"memory, estimated: {memory(4 * cost.params)} for weights, "
        f"{memory(cost.activation_bytes * batch_size)} for a batch",
        f"classes: {model.output_shape[-1]}",
    ]
    if num_images is not None:
        steps = counted(-(-num_images // batch_size), "step")
        lines.append(f"images: {num_images}, in {steps}")
    return "\n".join(lines)


def memory(size):
    """A number of bytes in MiB, or in GiB from 1 GiB up."""
    if round(size / 2**20) < 2**10:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / 2**30:,.1f} GiB"


def cost_lines(cost):
    """Lines of text for a `models.Cost`: parameters and multiply-adds."""
    return [
        f"parameters: {cost.params / 1e6:.2f} million, "
        f"{cost.active_params / 1e6:.2f} million active per token",
        f"multiply-adds per image: {cost.macs / 1e6:,.1f} million",
    ]

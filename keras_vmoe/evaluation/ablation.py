"""How accuracy depends on single experts, the routers and K."""

import contextlib
import math
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_vmoe import models
from keras_vmoe.evaluation.measurement import measure
from keras_vmoe.layers import MLPExperts
from keras_vmoe.layers import TopKRouter
from keras_vmoe.models.placement import moe_layers


def ablate(
    model: keras.Model,
    dataset: Iterable[Any],
    verbose: int = 0,
    seed: int = 0,
    layers: str | Sequence[str] | None = None,
    max_images: int | None = None,
) -> list[dict[str, Any]]:
    """Measures a model without single experts, with random routers, and by K.

    A removed expert outputs zero; its tokens are not rerouted. A random router
    has shuffled gate weights. The weights are changed for each measurement and
    restored afterwards: nothing else may use the model in the meantime.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE` with `layers.MLPExperts`.
        dataset: Iterable of batches of `(images, labels)` that can be read
            repeatedly, such as `data.load(..., training=False)`.
        verbose: Whether to print each measurement.
        seed: Integer, seed of the random routers.
        layers: Names of MoE layers; None means all. K changes in all layers.
        max_images: Uses only the first images, up to this number; None means
            all. Images of a truncated batch are routed without the rest of it.

    Returns:
        List of dicts: `layer`, `change`, `accuracy`, and `difference` from the
        accuracy of the unchanged model, which comes first.

    Raises:
        ValueError: If the model has no MoE layers, no layer of a given name,
            or custom expert banks.

    Example:

    >>> rows = ablate(model, test)  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix E.
    """
    found = moe_layers(model, layers)
    others = [x.name for x in found if type(x.experts) is not MLPExperts]
    if others:
        raise ValueError(
            "The MoE layers must use `MLPExperts`. Received: "
            f"model={model.name!r}, with other banks in {others}. Choose other "
            "`layers`."
        )
    first_images = _FirstImages(dataset, max_images)
    rows: list[dict[str, Any]] = []
    generator = np.random.default_rng(seed)

    def add(layer, change, changed=model):
        accuracy = measure(changed, first_images, routing=False).accuracy
        first = rows[0]["accuracy"] if rows else accuracy
        row = {"layer": layer, "change": change, "accuracy": accuracy}
        rows.append({**row, "difference": accuracy - first})
        if verbose:
            print(f"{layer} {change}: {accuracy:.4f}".strip(), flush=True)

    add("", "as it is")
    for layer in found:
        bank = layer.experts
        output = [bank.output_kernel, bank.output_bias]
        output = [weight for weight in output if weight is not None]
        for e in range(layer.num_experts):
            with _changed(output, _without(e)):
                add(layer.name, f"without expert {e}")
        gate = layer.router.gate_layer.weights  # Frozen ones, too.
        gate = [weight for weight in gate if len(weight.shape) > 1]
        with _changed(gate, generator.permuted):
            add(layer.name, "random router")
    for k in _numbers_selected(moe_layers(model)):
        dial = models.set_routing(model, num_selected_experts=k)
        add("", f"K={k}", dial)
    return rows


class _FirstImages:
    """The first images of a dataset of batches, readable repeatedly."""

    def __init__(self, dataset, max_images):
        self.dataset, self.max_images = dataset, max_images
        self.preprocessing = getattr(dataset, "preprocessing", None)

    def __iter__(self):
        left = math.inf if self.max_images is None else self.max_images
        for images, labels in self.dataset:
            part = slice(0, min(len(images), left))
            yield images[part], labels[part]
            left -= len(images)
            if left <= 0:
                return


def _without(expert):
    def change(array):
        array = array.copy()
        array[expert] = 0
        return array

    return change


@contextlib.contextmanager
def _changed(weights, change):
    """Changes weights temporarily."""
    before = [keras.ops.convert_to_numpy(w).copy() for w in weights]
    try:
        for weight, array in zip(weights, before, strict=True):
            weight.assign(change(array))
        yield
    finally:
        for weight, array in zip(weights, before, strict=True):
            weight.assign(array)


def _numbers_selected(found):
    """Values of K to try; none unless tokens choose in all layers."""
    if not all(isinstance(x.router, TopKRouter) for x in found):
        return []
    of_member = (x.num_experts // x.router.copies for x in found)
    return range(1, 1 + min(4, *of_member))


def ablation_table(rows):
    """The rows of `ablate` as text."""
    width = max(len(row["layer"]) for row in rows)
    return "\n".join(
        f"{row['layer']:<{width}}  {row['change']:<18} "
        f"{row['accuracy']:.4f}  {row['difference']:+.4f}"
        for row in rows
    )

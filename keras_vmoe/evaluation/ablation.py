"""What accuracy owes to single experts, to the routers, and to K."""

import contextlib
import math

import keras
import numpy as np

from keras_vmoe import models
from keras_vmoe.evaluation.measurement import measure
from keras_vmoe.layers import MLPExperts
from keras_vmoe.layers import TopKRouter
from keras_vmoe.models.placement import moe_layers


def ablate(model, dataset, verbose=0, seed=0, layers=None, max_images=None):
    """Measures a model without single experts, with random routers, and by K.

    A token of a removed expert gets nothing from it and no other one. A random
    router has its gate's weights in random order. The weights are changed for
    each measurement and put back: nothing else may use the model meanwhile.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE` with `layers.MLPExperts`.
        dataset: Iterable of batches of `(images, labels)` that can be read
            again, such as `data.load(..., training=False)`.
        verbose: Whether to print each measurement.
        seed: Integer, seed of the random routers.
        layers: Names of MoE layers; None means all. K is that of all.
        max_images: Images at most, the first ones; None means all. Those of a
            batch that is cut are routed without the rest of it.

    Returns:
        List of dicts: `layer`, `change`, `accuracy`, and `difference` from that
        of the model as it is, which comes first.

    Raises:
        ValueError: If the model has no MoE layers, or banks of one's own, or
            no layer of a name.

    Example:

    >>> rows = ablate(model, test)  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix E.
    """
    found = moe_layers(model, layers)
    others = [x.name for x in found if type(x.experts) is not MLPExperts]
    if others:
        raise ValueError(
            "The MoE layers must have the bank `MLPExperts`. Received: "
            f"model={model.name!r}, with other banks in {others}. Name other "
            "`layers`."
        )
    dataset, rows = _FirstImages(dataset, max_images), []
    generator = np.random.default_rng(seed)

    def add(layer, change, changed=model):
        accuracy = measure(changed, dataset, routing=False).accuracy
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
    """The first images of a dataset of batches, which can be read again."""

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
    """Weights that are others for a while."""
    before = [keras.ops.convert_to_numpy(w).copy() for w in weights]
    try:
        for weight, array in zip(weights, before, strict=True):
            weight.assign(change(array))
        yield
    finally:
        for weight, array in zip(weights, before, strict=True):
            weight.assign(array)


def _numbers_selected(found):
    """Values of K to try, where tokens choose in all layers."""
    if not all(isinstance(x.router, TopKRouter) for x in found):
        return []
    return range(1, 1 + min(4, *(x.num_experts for x in found)))


def ablation_table(rows):
    """The rows of `ablate` as text."""
    width = max(len(row["layer"]) for row in rows)
    return "\n".join(
        f"{row['layer']:<{width}}  {row['change']:<18} "
        f"{row['accuracy']:.4f}  {row['difference']:+.4f}"
        for row in rows
    )

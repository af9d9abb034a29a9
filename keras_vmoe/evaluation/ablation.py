"""What accuracy owes to single experts, to the routers, and to K."""

import contextlib

import keras
import numpy as np

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.evaluation.measurement import measure


def ablate(model, dataset, verbose=0, seed=0):
    """Measures a model without single experts, with random routers, and by K.

    A token of a removed expert gets nothing from it and no other one. A random
    router has its gate's weights in random order. The weights are changed for
    each measurement and put back: nothing else may use the model meanwhile.

    Args:
        model: A `ViTMoE` or `ConvNeXtMoE` with `layers.MLPExperts`.
        dataset: Iterable of batches of `(images, labels)` that can be read
            again, such as `data.load(..., training=False)`.
        verbose: Whether to print each measurement.
        seed: Integer, seed of the random routers.

    Returns:
        List of dicts: `layer`, `change`, `accuracy`, and `difference` from that
        of the model as it is, which comes first.

    Raises:
        ValueError: If the model has no MoE layers, or banks of one's own.

    Example:

    >>> rows = ablate(model, test)  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix E.
    """
    found = [x for x in model.layers if isinstance(x, layers.MoEMLP)]
    others = [x.name for x in found if type(x.experts) is not layers.MLPExperts]
    if not found or others:
        raise ValueError(
            "The model must have MoE layers, with the bank `MLPExperts`. "
            f"Received: model={model.name!r}, "
            f"{f'other banks in {others}' if others else 'without any'}."
        )
    rows = []
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
        gate = layer.router.gate_layer.trainable_weights
        with _changed(gate, generator.permuted):
            add(layer.name, "random router")
    for k in _numbers_selected(found):
        dial = models.set_routing(model, num_selected_experts=k)
        add("", f"K={k}", dial)
    return rows


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
    if not all(isinstance(x.router, layers.TopKRouter) for x in found):
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

"""Models whose experts are stored in fewer bytes."""

from keras_vmoe._checks import check_choice
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.layers.quantized_experts import QuantizedMLPExperts
from keras_vmoe.models.cloning import clone_around
from keras_vmoe.models.cloning import set_part
from keras_vmoe.models.cloning import share_parts

KINDS = ("int8", "float16")


def check_quantization(model, kind, kinds):
    """Raises unless the experts of a model can be stored so."""
    check_choice("quantize_experts", kind, (None, *kinds))
    experts = [layer.experts for layer in moe_layers_of(model)]
    all_known = experts and all(isinstance(x, MLPExperts) for x in experts)
    if kind is not None and not all_known:
        kinds = sorted({type(x).__name__ for x in experts}) or "a dense model"
        raise ValueError(
            "Only `MLPExperts` are quantized. Received: "
            f"quantize_experts={kind!r} with {kinds}. Leave it out."
        )


def with_quantized_experts(model, kind):
    """The model with quantized experts; all other weights are shared.

    Args:
        model: A model with MoE layers.
        kind: `"int8"` or `"float16"`.

    Returns:
        A model.
    """

    def change(layer):
        new = type(layer).from_config(layer.get_config())
        share_parts(new, layer)
        set_part(new, "router", layer.router)
        experts = QuantizedMLPExperts.from_experts(layer.experts, kind)
        set_part(new, "experts", experts)
        new.build(layer.get_build_config()["input_shape"])
        return new

    return clone_around(model, change)

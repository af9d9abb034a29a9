"""What the MoE layer is compared with, besides a dense MLP.

`EinsumMoE` is ours, in the way of GShard and of the reference program of V-MoE.
The others are layers of other libraries, which only this benchmark needs:
`pip install -e ".[benchmark]"`. A library that is not installed is left out of
the table.
"""

import importlib.util

import keras
from keras import ops

from keras_vmoe import layers
from keras_vmoe import losses
from keras_vmoe import routing
from keras_vmoe.routing._groups import group_tokens
from keras_vmoe.routing._groups import ungroup_tokens
from keras_vmoe.routing._selection import select_experts


class EinsumMoE(keras.layers.Layer):
    """Top-K routing with one-hot `(G, S, E, C)` tensors and einsums.

    The same gates, noise, capacity, order of service and auxiliary losses as
    `MoEMLP`, by the cumulative sums and einsums of GShard.
    """

    def __init__(self, num_experts, hidden_dim, num_selected, capacity_factor):
        super().__init__()
        self.num_experts = num_experts
        self.num_selected = num_selected
        self.capacity_factor = capacity_factor
        self.gate = layers.LinearGate(num_experts)
        self.experts = layers.MLPExperts(
            num_experts, hidden_dim, activation="gelu_tanh"
        )
        self.seed_generator = keras.random.SeedGenerator(0)

    def build(self, shape):
        self.gate.build((None, None, shape[-1]))
        self.experts.build((None, self.num_experts, None, shape[-1]))

    def call(self, inputs, training=False):
        tokens, _, size, _ = group_tokens(inputs, 8)
        logits = self.gate(tokens)
        noisy = logits
        if training:
            noise = keras.random.normal(
                ops.shape(logits), seed=self.seed_generator
            )
            noisy = logits + noise / self.num_experts
            self.add_loss(0.005 * self._losses_of(logits, noisy))
        capacity = routing.capacity(
            size, self.num_experts, self.num_selected, self.capacity_factor
        )
        combine = self._combine_weights(ops.softmax(noisy), capacity)
        dispatch = ops.cast(combine > 0, tokens.dtype)
        buffers = ops.einsum("gsec,gsd->gecd", dispatch, tokens)
        buffers = self.experts(buffers, training=training)
        outputs = ops.einsum("gsec,gecd->gsd", combine, buffers)
        return ungroup_tokens(outputs, ops.shape(inputs))

    def _losses_of(self, logits, noisy):
        load = losses.load_loss(
            logits, noisy, 1 / self.num_experts, self.num_selected
        )
        importance = losses.importance_loss(ops.softmax(logits))
        return ops.mean(load + importance)

    def _combine_weights(self, gates, capacity):
        """`(G, S, E, C)`, the gates at the slots of the tokens."""
        experts, weights = select_experts(gates, self.num_selected)
        groups, tokens, choices = ops.shape(experts)
        chosen = ops.one_hot(experts, self.num_experts)  # (G, S, K, E)
        # All first choices before all second choices.
        queue = ops.transpose(chosen, (0, 2, 1, 3))
        queue = ops.reshape(queue, (groups, choices * tokens, -1))
        place = ops.cumsum(queue, axis=1) * queue - 1.0
        place = ops.reshape(place, (groups, choices, tokens, -1))
        place = ops.max(ops.transpose(place, (0, 2, 1, 3)), axis=2)  # (G, S, E)
        # Beyond the capacity no place is equal: dropped.
        place = place[..., None] == ops.arange(capacity, dtype=place.dtype)
        place = ops.cast(place, gates.dtype)
        weights = ops.sum(chosen * weights[..., None], axis=2)  # (G, S, E)
        return weights[..., None] * place


def others(num_experts, hidden_dim, num_selected, capacity_factor, features):
    """Layers of other libraries by name, those that are installed.

    Args:
        num_experts: E.
        hidden_dim: F.
        num_selected: K.
        capacity_factor: Room of the experts, where the layer has a capacity.
        features: D.

    Returns:
        Dict from name to a function that makes the layer.
    """
    backend = keras.backend.backend()
    found = {}
    if importlib.util.find_spec("keras_hub"):
        found["keras_hub"] = lambda: keras_hub_layer(
            num_experts, hidden_dim, num_selected, features
        )
    if backend == "tensorflow" and importlib.util.find_spec("official"):
        found["model garden"] = lambda: model_garden_layer(
            num_experts, hidden_dim, num_selected * capacity_factor
        )
    if backend == "torch" and importlib.util.find_spec("mixture_of_experts"):
        if num_selected == 2:  # The only number that it has.
            found["mixture-of-experts"] = lambda: mixture_of_experts_layer(
                num_experts, hidden_dim, capacity_factor, features
            )
    return found


def keras_hub_layer(num_experts, hidden_dim, num_selected, features):
    """KerasHub's layer: every expert works on every token.

    Its experts have three matrices; 2/3 of the hidden features make the FLOPs
    per expert and token equal.
    """
    from keras_hub.src.models.qwen3_moe import qwen3_moe_decoder

    class First(qwen3_moe_decoder.Qwen3SparseMoeBlock):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training)[0]

    return First(
        features, 2 * hidden_dim // 3, num_experts, num_selected, False
    )


def model_garden_layer(num_experts, hidden_dim, capacity_factor):
    """TensorFlow Model Garden's layer: expert choice, one-hot einsums."""
    from official.nlp.modeling.layers import moe

    return moe.MoeLayer(
        moe.FeedForwardExperts(num_experts, hidden_dim),
        moe.ExpertsChooseMaskedRouter(num_experts, export_metrics=False),
        train_capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        examples_per_group=8.0,
    )


def mixture_of_experts_layer(
    num_experts, hidden_dim, capacity_factor, features
):
    """The PyPI package mixture-of-experts: top 2, one-hot einsums."""
    import mixture_of_experts
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = mixture_of_experts.MoE(
                dim=features,
                num_experts=num_experts,
                hidden_dim=hidden_dim,
                activation=torch.nn.GELU,
                second_policy_train="all",
                second_policy_eval="all",
                # Its factor is per token, not per choice.
                capacity_factor_train=2 * capacity_factor,
                capacity_factor_eval=2 * capacity_factor,
            )
            self.losses = []

        def build(self, shape):
            pass

        def forward(self, inputs, training=False):
            self.moe.train(training)
            tokens = inputs.reshape(1, -1, inputs.shape[-1])
            outputs, loss = self.moe(tokens)
            self.losses = [loss]
            return outputs.reshape(inputs.shape)

    return Layer()

"""The MoE layer: router and experts, for any Keras model."""

import contextlib
import functools
import inspect
import math
import re
from typing import Any
from typing import Literal
from typing import NoReturn
from typing import Self

import keras
from keras import ops

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_mask
from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.distribution import _constraints
from keras_vmoe.distribution import _replicas
from keras_vmoe.layers.bank import BANK
from keras_vmoe.layers.bank import check_bank
from keras_vmoe.layers.bank import check_built
from keras_vmoe.layers.bank import check_output
from keras_vmoe.layers.bank import check_settings_of
from keras_vmoe.layers.bank import check_weights
from keras_vmoe.layers.expert_choice_router import ExpertChoiceRouter
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.layers.parts import KeepsParts
from keras_vmoe.layers.parts import hand_down
from keras_vmoe.layers.routers import IMAGES_PER_GROUP
from keras_vmoe.layers.routers import OWNERS
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.routers import group_of
from keras_vmoe.layers.routers import share
from keras_vmoe.layers.routers import with_layers
from keras_vmoe.layers.soft_router import SoftRouter
from keras_vmoe.layers.top_k_router import BiasBalancedRouter
from keras_vmoe.layers.top_k_router import TopKRouter
from keras_vmoe.layers.weights import mark
from keras_vmoe.routing._blocks import Blocks
from keras_vmoe.routing._groups import group_tokens
from keras_vmoe.routing._groups import ungroup_tokens
from keras_vmoe.routing.plans import Plan

ROUTERS: dict[str, type[Router]] = {
    "bias_balanced": BiasBalancedRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft": SoftRouter,
    "top_k": TopKRouter,
}


@keras.saving.register_keras_serializable("keras_vmoe")
class MoEMLP(KeepsParts, keras.layers.Layer):
    """A sparse mixture of MLPs that replaces an MLP.

    Tokens are the positions of the middle axes: patches of a ViT, pixels of a
    feature map. `images_per_group` consecutive images are routed together. A
    partial group (the last one of a batch, or a batch smaller than a group)
    behaves as if padded with tokens that take no capacity. The result never
    depends on the number of devices.

    Put it on a residual branch: a token that all its experts drop gets 0. The
    output of a NaN or infinite token is NaN or infinite; groups without one are
    unaffected. (With expert choice, a bad token that no expert chooses gets 0:
    the residual carries it.)

    Args:
        num_experts: E.
        hidden_dim: F, hidden features of one expert. A custom bank has its own
            sizes.
        router: A router, such as `layers.TopKRouter(num_experts, ...)`, or
            the name of one with its default settings: `"top_k"` (or None),
            `"bias_balanced"`, `"expert_choice"` or `"soft"`. One router may
            serve several layers of equal feature width, which then share its
            weights.
        experts: An expert bank: any layer from buffers `(G, E, C, D)` to the
            same shape, whose weights of two or more axes start with axis E.
            None means `MLPExperts`. A bank given to several layers is shared.
            Dropless routing needs a bank with `takes_blocks = True`.
        images_per_group: Images that are routed together; None means 8, and
            `"batch"` makes the whole batch one group. 1 makes images
            independent, as they always are with a `SoftRouter`. An
            `EnsembleRouter` gets copies of an image; they count as one.
        **kwargs: Further arguments of `MLPExperts` for the default bank
            (`activation`, `dropout`, `kernel_initializer`, `bias_initializer`,
            `kernel_regularizer`, `bias_regularizer`, `kernel_constraint`,
            `bias_constraint`, `use_output_bias`, and the `seed` of its dropout;
            the router has its own), and of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, ..., D)` float tensor with at least one axis of tokens.
        mask: Optional `(B, ...)` bool tensor, False for tokens that take no
            slot in any expert and get 0. Keras passes it if an earlier layer
            made one. The capacity is still that of the whole group.
        training: Whether to route with noise, add the auxiliary losses and
            apply dropout.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If the inputs have no axis of tokens, or not the features
            that the layer was built for; if router and layer differ in their
            number of experts; or if a replica of tf.distribute would train on
            part of a group.

    Example:

    >>> layer = MoEMLP(num_experts=4, hidden_dim=32)
    >>> layer(keras.random.normal((2, 7, 7, 16))).shape
    (2, 7, 7, 16)

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2.
        Their groups have a fixed number of tokens that must divide the batch;
        ours take any batch.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None = None,
        router: Router | str | None = None,
        experts: keras.layers.Layer | None = None,
        images_per_group: int | Literal["batch"] | None = IMAGES_PER_GROUP,
        **kwargs: Any,
    ) -> None:
        for name in kwargs.keys() & OWNERS:
            raise ValueError(
                f"`{name}` is a setting of the router. Received: {name}="
                f"{kwargs[name]!r}. Write `router=layers.TopKRouter(num_experts"
                ", ...)` with it."
            )
        bank = {name: kwargs.pop(name) for name in BANK & kwargs.keys()}
        kwargs["name"] = kwargs.get("name") or _new_name(type(self))
        super().__init__(**kwargs)
        check_sizes(num_experts=num_experts)
        self.supports_masking = True
        self.num_experts = int(num_experts)
        if router is None or isinstance(router, str):
            check_choice("router", router or "top_k", ROUTERS)
            router = ROUTERS[router or "top_k"](
                num_experts, dtype=self.dtype_policy, name="router"
            )
        _check_router(router, num_experts)
        if experts is None:
            if hidden_dim is None:
                raise ValueError(
                    "Experts need `hidden_dim`, their hidden features, or a "
                    "custom bank. Received: hidden_dim=None, experts=None."
                )
            dtype = self.dtype_policy
            experts = MLPExperts(
                num_experts, hidden_dim, **bank, dtype=dtype, name="experts"
            )
        else:
            check_bank(experts, num_experts)
            check_settings_of(experts, {"hidden_dim": hidden_dim, **bank})
        self.router = router
        self.experts = experts
        self.images_per_group = group_of(router, images_per_group)
        self._rows_per_group = self.images_per_group
        if self.images_per_group != "batch":  # Copies of an ensemble count.
            self._rows_per_group *= getattr(router, "copies", 1)
        call = inspect.signature(experts.call).parameters
        self._takes_training = "training" in call
        hand_down(self)

    @property
    def hidden_dim(self) -> int | None:
        """F of an expert; None if the bank does not define it."""
        return getattr(self.experts, "hidden_dim", None)

    def build(self, input_shape: Shape) -> None:
        self._check_rank(input_shape)
        features = input_shape[-1]
        if features is None:
            raise ValueError(
                "The number of features must be known. "
                f"Received: input_shape={tuple(input_shape)}."
            )
        self.features = features
        group = (None, self._group_size(input_shape), features)
        if not self.router.built:
            self.router.build(group)
        self.router.check_features(features)
        if self.experts.built:
            check_built(self.experts, self.num_experts, features)
        else:
            # This part of their path marks variables as the experts'.
            is_named = self.experts.name == "experts"
            scope = contextlib.nullcontext if is_named else keras.name_scope
            with scope("experts"):
                shape = (None, self.num_experts, None, features)
                # A call, for banks that create weights in `call`.
                self.experts(keras.KerasTensor(shape, self.compute_dtype))
        check_weights(self.experts, self.num_experts)
        mark(self.router.weights, "gate")
        mark(self.experts.variables, "expert")
        self.restore_parts()

    def _group_size(self, input_shape):
        """S of a full group; None if unknown."""
        sizes = (self._rows_per_group, *input_shape[1:-1])
        is_open = None in sizes or "batch" in sizes
        return None if is_open else math.prod(sizes)

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        _check_not_traced()
        self._check_features(inputs.shape)
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, self.compute_dtype)  # Keras leaves them.
        if inputs.shape[0] == 0:
            return inputs
        if training:
            _replicas.check_groups(inputs.shape[0], self._rows_per_group)
        groups = group_tokens(inputs, self._rows_per_group, mask)
        plan = self._plan(groups, training)
        buffers = plan.dispatch(groups.tokens)  # (G, E, C, D)
        buffers = self._run(buffers, training)
        # A custom bank may have its own dtype policy.
        tokens = ops.cast(plan.combine(buffers), inputs.dtype)
        return ungroup_tokens(tokens, ops.shape(inputs))

    def _run(self, buffers, training):
        """Returns the bank's outputs, in the shape of the buffers."""
        options = {"training": training} if self._takes_training else {}
        bank = functools.partial(self.experts, **options)
        if isinstance(buffers, Blocks):
            _constraints.check_buffers(self.experts.path)
            if not getattr(self.experts, "takes_blocks", False):
                raise ValueError(
                    f"The bank {self.experts.name!r} takes buffers (groups, "
                    "experts, capacity, features), which dropless routing does "
                    "not make. Received: capacity_factor='dropless'. Set "
                    "capacity_factor=num_experts / num_selected_experts, which "
                    "drops nothing either."
                )
            return bank(buffers)
        outputs = _constraints.exchanged(bank, buffers)
        check_output(outputs, buffers.shape, self.experts.name)
        return outputs

    def sharing(self, **changes: Any) -> Self:
        """Returns a new layer with the same settings and weights.

        Args:
            **changes: Constructor arguments that differ.

        Returns:
            A layer, built if this one is. It shares all sublayers of this one,
            except those among the changes.
        """
        return share(self, **changes)

    def quantize(self, mode: str | None = None, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"Quantize the parts of a {type(self).__name__}, or the model "
            f"around it. Received: mode={mode!r}. Call "
            f"`layer.experts.quantize({mode!r})`."
        )

    def plan(self, inputs: Tensor, mask: Tensor | None = None) -> Plan:
        """Returns the routing plan of a batch, as in evaluation.

        Args:
            inputs: `(B, ..., D)` float tensor.
            mask: Optional `(B, ...)` bool tensor.

        Returns:
            The router's plan.
        """
        groups = group_tokens(inputs, self._rows_per_group, mask)
        return self._plan(groups, training=False)

    def _plan(self, groups, training):
        return self.router(
            groups.tokens,
            mask=groups.mask,
            group_size=groups.group_size,
            images_per_group=groups.images_per_group,
            training=training,
        )

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool = False
    ) -> keras.KerasTensor:
        # Keras would trace `call` with a placeholder batch that fits no group.
        self._check_features(inputs.shape)
        check_mask(mask, inputs.shape[:-1])
        # The bank takes any number of groups and slots: these are arbitrary.
        shape = (1, self.num_experts, 4, self.features)
        buffers = keras.KerasTensor(shape, dtype=self.compute_dtype)
        options = {"training": training} if self._takes_training else {}
        outputs = self.experts.compute_output_spec(buffers, **options)
        check_output(outputs, shape, self.experts.name)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def _check_rank(self, shape):
        if len(shape) < 3:
            raise ValueError(
                "`MoEMLP` takes inputs of shape (batch, tokens..., features) "
                "with at least one axis of tokens. "
                f"Received: shape={tuple(shape)}. For vectors, add an axis of "
                "one token: `keras.ops.expand_dims(x, 1)`."
            )

    def _check_features(self, shape):
        self._check_rank(shape)
        if 0 in shape[1:-1]:
            raise ValueError(
                "`MoEMLP` needs at least one token per image. "
                f"Received: shape={tuple(shape)}. Leave the layer out where "
                "there are no tokens."
            )
        if self.built and shape[-1] != self.features:
            raise ValueError(
                f"This layer was built for {self.features} features. "
                f"Received: shape={tuple(shape)}, with {shape[-1]} features. "
                "Project the inputs first or use a new layer."
            )

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            # Objects: Keras recognizes those that several layers share.
            "router": self.router,
            "experts": self.experts,
            "images_per_group": self.images_per_group,
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = with_layers(config, "router", "experts")
        if config.get("images_per_group", "") is None:  # Of version 0.1.0.
            config["images_per_group"] = "batch"
        return super().from_config(config)


def _new_name(layer_class):
    """Returns `moe_mlp`, then `moe_mlp_1`; Keras would say `mo_emlp`."""
    words = layer_class.__name__.replace("MoEMLP", "MoeMlp")
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", words).lower()
    uid = keras.backend.get_uid(name)
    return name if uid == 1 else f"{name}_{uid - 1}"


def _check_not_traced():
    """Raises if PyTorch's tracer would fix the size of the batch."""
    if keras.backend.backend() != "torch":
        return
    import torch

    if torch.jit.is_tracing():
        raise ValueError(
            "The graph of `MoEMLP` must hold for batches of any size. Received:"
            " a call that torch.jit traces, with the numbers of one batch, as "
            "`model.export(format='onnx')` does. Use "
            "`keras_vmoe.export.onnx(model, path)`."
        )


def _check_router(router, num_experts):
    """Raises unless this is a router with `num_experts` experts."""
    if not isinstance(router, Router):
        raise ValueError(
            f"`router` must be a router, one of {sorted(ROUTERS)} or None. "
            f"Received: router={router!r}. "
            "Write `layers.TopKRouter(num_experts, ...)`."
        )
    if router.num_experts != num_experts:
        raise ValueError(
            "Router and layer must have the same number of experts. "
            f"Received: router.num_experts={router.num_experts} and "
            f"num_experts={num_experts}. Give both the same number."
        )

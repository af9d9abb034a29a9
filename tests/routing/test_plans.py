"""The contract of plans: what `routing.Plan` says holds for every plan."""

import inspect
import re

import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import losses
from keras_vmoe import routing
from keras_vmoe.routing.dropless import DroplessPlan
from keras_vmoe.routing.expert_choice import ExpertChoicePlan
from keras_vmoe.routing.plans import SparsePlan
from keras_vmoe.routing.soft import SoftPlan
from tests.gradients import compiled
from tests.routing.cases import GATES

G, S, E, K, C, P, D = 2, 9, 4, 2, 5, 3, 6
PLANS = {
    SparsePlan: lambda gates, mask: routing.top_k_plan(gates, K, C, mask=mask),
    DroplessPlan: lambda gates, mask: routing.dropless_plan(gates, K, mask),
    ExpertChoicePlan: lambda gates, mask: routing.expert_choice_plan(
        gates, C, mask
    ),
    SoftPlan: lambda gates, mask: routing.soft_plan(
        ops.repeat(gates[..., None], P, axis=-1), mask
    ),
}
METHODS = (
    "dispatch",
    "combine",
    "load_share",
    "dropped_share",
    "experts_of_images",
)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("masked", [False, True])
def test_contract(kind, masked):
    tokens = np.random.default_rng(0).normal(size=(G, S, D)).astype("float32")
    mask = np.ones((G, S), bool)
    mask[0, [1, 4]] = False

    def everything(gates, tokens, mask):
        plan = PLANS[kind](gates, mask if masked else None)
        check_plan(plan, kind)
        buffers = plan.dispatch(tokens)
        check_buffers(buffers, kind)
        shares = (plan.load_share(), plan.dropped_share())
        return plan.combine(buffers), *shares, plan.experts_of_images(3)

    combined, load, dropped, served = map(
        ops.convert_to_numpy,
        compiled(everything)(GATES["random"], tokens, mask),
    )
    assert combined.shape == (G, S, D)
    assert np.isfinite(combined).all() and combined.any()
    if masked:
        assert not combined[~mask].any()
    assert load.shape == (E,) and load.sum() == pytest.approx(1, rel=1e-5)
    assert dropped.shape == () and 0 <= dropped <= 1
    assert served.shape == (G, 3, E) and served.dtype == bool


@pytest.mark.backends("torch")
def test_a_mask_of_another_shape_is_refused():
    """None is broadcast, in plans, losses and routers."""
    gates = ops.convert_to_tensor(GATES["random"])
    uses = {
        **{kind: lambda m, kind=kind: PLANS[kind](gates, m) for kind in PLANS},
        **{
            loss: lambda m, loss=loss: loss(gates, mask=m)
            for loss in (
                *(losses.importance_loss, losses.gshard_loss),
                losses.router_z_loss,
            )
        },
        "load": lambda m: losses.load_loss(gates, gates, 1.0, K, mask=m),
        "router": lambda m: layers.TopKRouter(E)(ops.ones((G, S, D)), mask=m),
    }
    for use in uses.values():
        for shape in ((1, S), (G, 1), (S,), (S, E), (G, S, 1), (S, G), ()):
            words = re.escape(f"a mask of shape {shape} for tokens {(G, S)}")
            with pytest.raises(ValueError, match=words):
                use(ops.ones(shape, "bool"))


def check_plan(plan, kind):
    """It has the methods of the contract, and their arguments."""
    assert type(plan) is kind and isinstance(plan, routing.Plan)
    for name in METHODS:
        found, said = (
            list(inspect.signature(getattr(x, name)).parameters)
            for x in (kind, routing.Plan)
        )
        assert found == said


def check_buffers(buffers, kind):
    """They have the shapes that the contract says."""
    if kind is not DroplessPlan:
        slots = P if kind is SoftPlan else C
        assert tuple(buffers.shape) == (G, E, slots, D)
        return
    blocks, slots, features = buffers.rows.shape
    assert blocks * slots >= G * S * K and features == D
    assert tuple(buffers.expert.shape) == (blocks,)
    assert tuple(buffers.count.shape) == ()


def test_what_is_no_plan():
    """A plan without one of the methods is none."""
    for left_out in METHODS:
        methods = {x: lambda self, *_: None for x in METHODS if x != left_out}
        assert not isinstance(type("Other", (), methods)(), routing.Plan)

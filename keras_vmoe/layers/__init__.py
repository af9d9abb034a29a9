"""Keras layers: the MoE layer, its routers, gates and experts.

The other modules of this package hold the parts of the models.
"""

from keras_vmoe.layers.ensemble_router import EnsembleRouter
from keras_vmoe.layers.expert_choice_router import ExpertChoiceRouter
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.layers.gates import CosineGate
from keras_vmoe.layers.gates import L2Gate
from keras_vmoe.layers.gates import LinearGate
from keras_vmoe.layers.mlp import MLP
from keras_vmoe.layers.moe import MoEMLP
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.shared_expert import SharedExpertMoEMLP
from keras_vmoe.layers.soft_router import SoftGate
from keras_vmoe.layers.soft_router import SoftRouter
from keras_vmoe.layers.top_k_router import BiasBalancedRouter
from keras_vmoe.layers.top_k_router import TopKRouter

__all__ = [
    "BiasBalancedRouter",
    "CosineGate",
    "EnsembleRouter",
    "ExpertChoiceRouter",
    "L2Gate",
    "LinearGate",
    "MLP",
    "MLPExperts",
    "MoEMLP",
    "Router",
    "SharedExpertMoEMLP",
    "SoftGate",
    "SoftRouter",
    "TopKRouter",
]

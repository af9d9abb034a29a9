"""Keras layers: gates, routers, experts, the MoE layer, parts of models."""

from keras_vmoe.layers.activations import gelu_tanh
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.convnext import convnext_block
from keras_vmoe.layers.encoder import encoder_block
from keras_vmoe.layers.expert_choice_router import ExpertChoiceRouter
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.layers.gates import CosineGate
from keras_vmoe.layers.gates import L2Gate
from keras_vmoe.layers.gates import LinearGate
from keras_vmoe.layers.mlp import MLP
from keras_vmoe.layers.moe import MoEMLP
from keras_vmoe.layers.patches import ClassToken
from keras_vmoe.layers.patches import PatchEmbedding
from keras_vmoe.layers.pooling import AttentionPooling
from keras_vmoe.layers.pooling import TokenPooling
from keras_vmoe.layers.positions import LearnedPositions
from keras_vmoe.layers.positions import SinCos2DPositions
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.shared_expert import SharedExpertMoEMLP
from keras_vmoe.layers.soft_router import SoftGate
from keras_vmoe.layers.soft_router import SoftRouter
from keras_vmoe.layers.stochastic import Dropout
from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale
from keras_vmoe.layers.top_k_router import BiasBalancedRouter
from keras_vmoe.layers.top_k_router import TopKRouter

__all__ = [
    "AttentionPooling",
    "BiasBalancedRouter",
    "CosineGate",
    "ExpertChoiceRouter",
    "L2Gate",
    "SharedExpertMoEMLP",
    "SoftGate",
    "SoftRouter",
    "ClassToken",
    "Dropout",
    "DropPath",
    "LayerScale",
    "LearnedPositions",
    "LinearGate",
    "MLP",
    "MLPExperts",
    "MoEMLP",
    "PatchEmbedding",
    "Router",
    "SelfAttention",
    "SinCos2DPositions",
    "TokenPooling",
    "TopKRouter",
    "convnext_block",
    "encoder_block",
    "gelu_tanh",
]

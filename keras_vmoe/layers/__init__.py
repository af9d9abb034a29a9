"""Keras layers: gates, routers, experts, the MoE layer, parts of a ViT."""

from keras_vmoe.layers.activations import gelu_tanh
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.encoder import encoder_block
from keras_vmoe.layers.experts import MLPExperts
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
from keras_vmoe.layers.routers import TopKRouter
from keras_vmoe.layers.stochastic import Dropout
from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale

__all__ = [
    "AttentionPooling",
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
    "encoder_block",
    "gelu_tanh",
]

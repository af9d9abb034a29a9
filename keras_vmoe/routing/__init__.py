"""Routing: which expert gets which token, as pure functions on `keras.ops`.

No weights and no Keras layers live here. Every shape, einsum, comment and test
of the package uses these letters:

| letter | meaning                                                            |
|--------|--------------------------------------------------------------------|
| B      | images in the batch                                                |
| N      | tokens per image (ViT: patches and class token; ConvNeXt: H * W)    |
| D, F   | token features, hidden features of an expert                       |
| G, S   | routing groups, tokens per group; groups are routed independently  |
| E, K   | experts, experts selected per token                                |
| C      | capacity: slots in one expert's buffer, per group                  |
| P      | slots per expert and image of a soft router                        |
| M, T   | blocks of a dropless plan, slots per block                         |

Data flows one way. The layer splits the images' tokens into groups. A function
such as `top_k_plan` turns gates into a `Plan`. The plan's `dispatch` fills the
experts' buffers, and its `combine` returns their outputs to the tokens. The
layer restores the images.
"""

from keras_vmoe.routing._groups import capacity
from keras_vmoe.routing.dropless import dropless_plan
from keras_vmoe.routing.expert_choice import expert_choice_plan
from keras_vmoe.routing.plans import Plan
from keras_vmoe.routing.soft import soft_plan
from keras_vmoe.routing.top_k import top_k_plan

__all__ = [
    "Plan",
    "capacity",
    "dropless_plan",
    "expert_choice_plan",
    "soft_plan",
    "top_k_plan",
]

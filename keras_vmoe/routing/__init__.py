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
| C      | capacity: places in one expert's buffer, per group                 |
| P      | slots per expert and image of a soft router                        |
| M, T   | blocks of a dropless plan, places of a block                       |

The data flows one way: `group_tokens` turns images' tokens into groups, a plan
function turns gates into a plan, the plan's `dispatch` fills the experts'
buffers, its `combine` brings their outputs back to the tokens, and
`ungroup_tokens` restores the images.
"""

from keras_vmoe.routing.dropless import Blocks
from keras_vmoe.routing.dropless import DroplessPlan
from keras_vmoe.routing.dropless import dropless_plan
from keras_vmoe.routing.expert_choice import ExpertChoicePlan
from keras_vmoe.routing.expert_choice import expert_choice_plan
from keras_vmoe.routing.groups import TokenGroups
from keras_vmoe.routing.groups import capacity
from keras_vmoe.routing.groups import group_tokens
from keras_vmoe.routing.groups import ungroup_tokens
from keras_vmoe.routing.plans import SparsePlan
from keras_vmoe.routing.selection import select_experts
from keras_vmoe.routing.soft import SoftPlan
from keras_vmoe.routing.soft import soft_plan
from keras_vmoe.routing.top_k import top_k_plan

__all__ = [
    "Blocks",
    "DroplessPlan",
    "ExpertChoicePlan",
    "SoftPlan",
    "SparsePlan",
    "TokenGroups",
    "capacity",
    "dropless_plan",
    "expert_choice_plan",
    "group_tokens",
    "select_experts",
    "soft_plan",
    "top_k_plan",
    "ungroup_tokens",
]

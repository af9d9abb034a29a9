"""What timm needs of torchvision.

PyPI's torchvision is built for another PyTorch than its CPU one; timm needs its
Python alone, which looks for these operators when it is imported.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    OPERATORS.define(
        f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor"
    )

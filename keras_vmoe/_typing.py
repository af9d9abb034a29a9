"""Types of the public signatures."""

from typing import Any
from typing import TypeAlias

# What `keras.ops` takes: a tensor of the current backend, a `KerasTensor` or a
# NumPy array. Keras declares no type for them.
Tensor: TypeAlias = Any
Shape: TypeAlias = tuple[int | None, ...]
# What `get_config` gives.
Config: TypeAlias = dict[str, Any]

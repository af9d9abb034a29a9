"""Types of the public signatures."""

from collections.abc import Callable
from typing import Any
from typing import TypeAlias

# What `keras.ops` takes: a tensor of the current backend, a `KerasTensor` or a
# NumPy array. Keras declares no type for them.
Tensor: TypeAlias = Any
# None is an unknown size; each layer checks the sizes that it needs.
Shape: TypeAlias = tuple[int | Any, ...]
# What `get_config` returns.
Config: TypeAlias = dict[str, Any]
# A name, a config, or the object itself.
Activation: TypeAlias = str | Config | Callable[..., Any]
Initializer: TypeAlias = str | Config | Callable[..., Any]
Regularizer: TypeAlias = str | Config | Callable[..., Any]
Constraint: TypeAlias = str | Config | Callable[..., Any]

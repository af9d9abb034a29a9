"""Expert parallelism: each device holds some of the experts, JAX only."""

import re
from collections.abc import Sequence

import keras
import numpy as np

from keras_vmoe._checks import is_integer
from keras_vmoe._typing import Shape
from keras_vmoe.distribution.data_parallel import DataParallel

REPLICA, EXPERT = "replica", "expert"
DATA = (REPLICA, EXPERT)  # The other order permutes all buffers.
# The variables of an MoE layer's bank, whose first axis is E; see `MoEMLP`.
EXPERTS = re.compile(r"(^|/)experts/")


class ExpertParallel(DataParallel):
    """Experts sharded over devices, everything else as in data parallelism.

    The devices form a mesh `(replica, expert)`. Batches are sharded over all
    of them. Each device holds `1 / num_expert_shards` of the experts' weights
    and optimizer slots. Tokens travel to their experts and back in two
    all-to-alls in the forward pass of each MoE layer, and two in its gradient.
    The results match those of one device: groups do not depend on the number
    of devices.

    Set it before the model is created. A batch must hold a whole number of
    groups for each device: `batch_size` must be divisible by `images_per_group`
    times the number of devices.

    Args:
        num_expert_shards: Number of devices that the experts are sharded over.
            Must divide the number of devices, and of experts.
        devices: Optional list of devices, as from
            `keras.distribution.list_devices()`; None means all of them.
        shard_dense: Whether to shard the other kernels, except those of
            convolutions, over all devices as well (fully sharded data
            parallelism), for models too large for one device. Each layer of
            the model must then return one tensor, batch first.

    Raises:
        ValueError: If the backend is not JAX, if `num_expert_shards` does not
            divide the devices or the experts, if the routing is dropless, if
            the model has no experts, or as in `DataParallel`.

    Example:

    >>> parallel = ExpertParallel(num_expert_shards=8)  # doctest: +SKIP
    >>> keras.distribution.set_distribution(parallel)  # doctest: +SKIP
    >>> model = ViTMoE(...); model.fit(...)  # doctest: +SKIP

    Reference:
        [Lepikhin et al., 2021](https://arxiv.org/abs/2006.16668) (GShard),
        section 3.3;
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix B.
    """

    def __init__(
        self,
        num_expert_shards: int,
        devices: Sequence[str] | None = None,
        shard_dense: bool = False,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise ValueError(
                "`ExpertParallel` needs the JAX backend. Received: the backend "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax, or use "
                "tf.distribute, whose devices each hold all experts."
            )
        if devices is None:
            devices = keras.distribution.list_devices()
        _check_shards(num_expert_shards, len(devices))
        shape = (len(devices) // num_expert_shards, num_expert_shards)
        mesh = keras.distribution.DeviceMesh(
            shape, list(DATA), np.array(devices).reshape(shape)
        )
        # Skips both `DataParallel`, whose mesh has one axis: Keras does not
        # export their base class.
        super(keras.distribution.DataParallel, self).__init__(mesh, REPLICA)  # type: ignore[call-arg]
        self.num_expert_shards = num_expert_shards
        self.num_devices = len(devices)
        self.shard_dense = shard_dense
        self._has_experts = num_expert_shards == 1

    def get_data_layout(
        self, data_shape: Shape
    ) -> keras.distribution.TensorLayout:
        if not self._has_experts:
            raise ValueError(
                "The model must have experts to shard over devices. "
                f"Received: num_expert_shards={self.num_expert_shards} and a "
                "model without experts. Set the distribution before creating a "
                "model with MoE layers, or use distribution.DataParallel."
            )
        self.check_images(data_shape[0])
        return self.layout(DATA, *[None] * (len(data_shape) - 1))

    def get_variable_layout(
        self, variable: keras.Variable
    ) -> keras.distribution.TensorLayout:
        layout = getattr(variable, "_layout", None)
        if layout is not None:
            return layout
        rest = [None] * (len(variable.shape) - 1)
        # Seeds and counters of a bank have a single axis.
        if EXPERTS.search(variable.path) and len(variable.shape) > 1:
            num_experts = variable.shape[0]
            if num_experts % self.num_expert_shards:
                raise ValueError(
                    "Each shard must hold the same number of experts. "
                    f"Received: num_expert_shards={self.num_expert_shards} for "
                    f"the {num_experts} experts of {variable.path!r}. Choose a "
                    "divisor of the number of experts."
                )
            self._has_experts = True
            return self.layout(EXPERT, *rest)
        # Not convolutions': XLA would gather images, not the small kernels.
        if self.shard_dense and len(variable.shape) in (2, 3):
            return self._dense_layout(variable.shape)
        return self.layout(*[None] * len(variable.shape))

    def get_tensor_layout(
        self, path: str
    ) -> keras.distribution.TensorLayout | None:
        # Outputs of the model's own layers stay with their images. XLA would
        # otherwise move these instead of gathering sharded kernels.
        is_of_model = path.count("/") == 1
        return self.layout(DATA) if self.shard_dense and is_of_model else None

    def _dense_layout(self, shape):
        """Shards the largest axis divisible by the number of devices."""
        axes = [None] * len(shape)
        good = [
            i for i, size in enumerate(shape) if not size % self.num_devices
        ]
        if good:
            axes[max(good, key=lambda i: shape[i])] = DATA
        return self.layout(*axes)

    def layout(
        self, *axes: str | tuple[str, ...] | None
    ) -> keras.distribution.TensorLayout:
        """The layout of a tensor with its dimensions sharded over `axes`."""
        return _Layout(axes, self.device_mesh)


class _Layout(keras.distribution.TensorLayout):
    """A layout that can shard one dimension over several axes of the mesh."""

    def _validate_axes(self):
        pass  # Keras would reject a tuple of axes as an unknown axis.


def _check_shards(num_expert_shards, num_devices):
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    if not is_integer(num_expert_shards) or num_expert_shards not in divisors:
        raise ValueError(
            "`num_expert_shards` must be a divisor of the number of devices, "
            f"{num_devices}. Received: num_expert_shards={num_expert_shards}. "
            f"Choose one of {divisors}."
        )

"""float32 where it decides which expert a token goes to."""

import contextlib
import functools

import keras


def in_float32(call):
    """Leaves a layer's `call` out of `torch.autocast`.

    Casting its inputs to float32 does not do it: products of float32 tensors
    are bfloat16 there.
    """

    @functools.wraps(call)
    def method(self, tokens, *args, **kwargs):
        with _without_autocast(tokens):
            return call(self, tokens, *args, **kwargs)

    return method


def _without_autocast(tensor):
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # Shapes alone, on "meta".
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)

"""float32 for the computations that decide a token's experts."""

import contextlib
import functools

import keras


def in_float32(call):
    """Excludes a layer's `call` from `torch.autocast`.

    Casting its inputs to float32 is not enough: under autocast, products of
    float32 tensors are bfloat16.
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

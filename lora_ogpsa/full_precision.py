"""`full_precision`: the maths of a correction, kept from what a training loop does to products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_DEVICES = ("cpu", "cuda")
# Where products of float32 may be rounded first: to TF32 on a GPU, to bfloat16 on some CPUs. Torch
# before 2.9 cannot be told so by backend.
_BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    getattr(torch.backends.mkldnn, "matmul", None),
)
_EXACT = ("none", "ieee")


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the context products of float32 are taken in float32.

    An optimizer's step may be taken under autocast, and on a GPU training may allow TF32. A
    projection in either leaves a thousandth of a step in the protected subspace, where float32
    leaves ten thousand times less.
    """
    with ExitStack() as stack:
        for kind in _DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for backend in _BACKENDS:
            precision = getattr(backend, "fp32_precision", "none")
            if precision not in _EXACT:
                backend.fp32_precision = "ieee"
                stack.callback(setattr, backend, "fp32_precision", precision)
        yield

"""What every operator asks of its arguments, with errors that name the argument, its value and what is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DEVICES = ("cuda", "cpu", "meta")


def refusal(name: str, value: object, served: str) -> ValueError:
    return ValueError(f"{name}: {value} is not served; {served} is")


def check_device(x: Tensor) -> None:
    """Raises ValueError where no kernel and no twin runs."""
    if x.device.type not in DEVICES:
        raise refusal("x.device", x.device, " or ".join(DEVICES))


def check_dtype(name: str, tensor: Tensor, served: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in served:
        raise refusal(f"{name}.dtype", tensor.dtype, " or ".join(map(str, served)))


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], why: str) -> None:
    """``why`` says where the shape comes from, as "(n, k) with k = 64 of x"."""
    if tuple(tensor.shape) != tuple(shape):
        raise refusal(f"{name}.shape", tuple(tensor.shape), why)


def check_together(x: Tensor, others: Mapping[str, Tensor]) -> None:
    """All on x's device and contiguous, x too."""
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise refusal(f"{name}.device", tensor.device, f"{x.device}, where x is,")
    for name, tensor in {"x": x, **others}.items():
        if not tensor.is_contiguous():
            raise refusal(f"{name}.stride()", tensor.stride(), "a contiguous tensor, such as .contiguous() returns,")

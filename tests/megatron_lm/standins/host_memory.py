"""Stands in for host memory beside a device's (``--optimizer-cpu-offload``): all tensors are on the
CPU, and all say that they are on CUDA but those that ``.cpu()`` returned and what is made of them.

Kept of the real one: all of Megatron's ``HybridDeviceOptimizer``, with torch's AdamW for the part
on the host. Not kept: streams and pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_KEEP_PLACE = (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float)


class _HostMemory(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result = result.view(result.shape)  # an object of its own
            result._on_host = True
        elif func in _KEEP_PLACE and getattr(args[0], "_on_host", False):
            result._on_host = True
        return result


def install() -> None:
    """For the whole process."""
    torch.Tensor.is_cuda = property(lambda self: not getattr(self, "_on_host", False))  # type: ignore[assignment]
    _HostMemory().__enter__()

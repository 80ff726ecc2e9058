"""Weighted sums of tensors with one rounding: the arithmetic of every merge.

Three paths give the same bits: ``native`` (the compiled extension, CPU), ``triton`` (CUDA) and
``eager`` (torch operations, wherever the others are not available).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from wsm_megatron.kernels import reference

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_TRITON = (3, 3)
"""The oldest Triton that compiles the CUDA kernel."""

Finite = bool | Tensor
"""True when every value written is finite. On CUDA a tensor: to ask it is to wait for the sum."""
BoundSum = Callable[[], Finite]
_Path = Callable[[Sequence[Tensor], Sequence[Sequence[float]], Sequence[Tensor]], BoundSum]


def weighted_sum(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> bool:
    """Writes ``outputs[k][e] = round(c[k][0] * x[0][e] + c[k][1] * x[1][e] + ...)`` for all k, e.

    Each output and each sum is rounded in float64, in the order of the sources, starting from the
    first output and without fused multiply-add; the result is rounded once, to nearest even, to
    the output's dtype. The bits do not depend on the path, the device, or how a tensor is cut into
    calls; only those of a NaN may.

    On a CPU the call works on the calling thread alone and releases the GIL, so callers may share
    out tensors over threads. On CUDA it uses the current stream and waits for the result. It is
    not collective: each rank calls it for itself.

    Args:
        sources: n one-dimensional contiguous tensors of one size on one device, any mix of
            bfloat16, float16, float32 and float64. n >= 1.
        coefficients: m rows of n finite numbers.
        outputs: m tensors of the same size and device, of any of these dtypes, that share no
            memory with a source or each other. m >= 1. The sources are read once for all of them
            (on CUDA once for every 4).

    Returns:
        True when every value written is finite.

    Raises:
        ValueError: an argument is not as described.
    """
    return bool(bind(sources, coefficients, outputs)())


def bind(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> BoundSum:
    """:func:`weighted_sum` of these tensors, to be called again whenever their contents changed.

    Checking the arguments takes longer than summing a tile; here it is done once. On CUDA a call
    starts the sum on the current stream and does not wait for it.
    """
    _check(sources, coefficients, outputs)
    if outputs[0].numel() == 0:
        return lambda: True
    bind_on, _ = _path(outputs[0].device.type)
    return bind_on(sources, coefficients, outputs)


def backend(device: torch.device | str) -> str:
    """The path :func:`weighted_sum` takes for tensors on ``device``, and why: ``"native: ..."``,
    ``"triton: ..."`` or ``"eager: ..."``."""
    return _path(torch.device(device).type)[1]


@cache
def _path(device_type: str) -> tuple[_Path, str]:
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"weighted_sum works on cpu and cuda tensors, not on {device_type}")
    path, reason = _native() if device_type == "cpu" else _triton()
    logger.info("weighted_sum on %s: %s", device_type, reason)
    return path, reason


def _native() -> tuple[_Path, str]:
    try:
        from wsm_megatron.kernels import native
    except ImportError as error:
        return reference.bind, f"eager: the C extension was not built ({error})"
    return native.bind, "native: the compiled C extension"


def _triton() -> tuple[_Path, str]:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return reference.bind, "eager: Triton is not installed"
    if tuple(map(int, version.split(".")[:2])) < _TRITON:
        return reference.bind, f"eager: Triton {version} knows no tuples, 3.3 (torch 2.7) does"
    try:
        from wsm_megatron.kernels import triton_kernel
    except ImportError as error:
        return reference.bind, f"eager: Triton cannot be imported ({error})"
    return triton_kernel.bind, "triton: the fused CUDA kernel"


def _check(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> None:
    if not sources or not outputs:
        raise ValueError("weighted_sum needs at least one source and one output")
    if len(coefficients) != len(outputs):
        raise ValueError(f"{len(coefficients)} rows of coefficients for {len(outputs)} outputs")
    for k, row in enumerate(coefficients):
        if len(row) != len(sources):
            raise ValueError(f"row {k} has {len(row)} coefficients for {len(sources)} sources")
        if not all(map(math.isfinite, row)):
            raise ValueError(f"row {k} has a coefficient that is not finite: {list(row)}")
    numel, device = outputs[0].numel(), outputs[0].device
    for kind, tensors in (("source", sources), ("output", outputs)):
        for i, tensor in enumerate(tensors):
            _check_tensor(f"{kind} {i}", tensor, numel, device)
    _check_overlap(sources, outputs)


def _check_tensor(name: str, tensor: Tensor, numel: int, device: torch.device) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; supported: {', '.join(map(str, DTYPES))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} must be one-dimensional and contiguous; its shape is {shape}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, output 0 has {numel}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, output 0 on {device}")


def _check_overlap(sources: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*outputs, *sources)]
    for k in range(len(outputs)):
        for other, (start, stop) in enumerate(spans):
            if other != k and start < spans[k][1] and spans[k][0] < stop:
                source = other - len(outputs)
                what = f"source {source}" if source >= 0 else f"output {other}"
                raise ValueError(f"output {k} and {what} share memory")

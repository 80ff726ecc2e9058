"""bf16 matrix products on CPUs that have no instructions for them.

There a product in bf16 costs several times one in float32. :func:`install` computes it in float32
and rounds the result once, which is at least as exact: the operands are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def is_slow() -> bool:
    """Whether this is an x86 CPU without bf16 instructions."""
    can = torch.cpu.get_capabilities()
    return can["architecture"] == "x86_64" and not (can["avx512_bf16"] or can["amx_bf16"])


def install() -> None:
    """Compute bf16 products in float32 from now on, their gradients too, in this process."""
    namespace: Any = torch
    for name in ("matmul", "mm", "bmm", "baddbmm"):
        setattr(namespace, name, _in_float32(getattr(torch, name)))
    for name in ("matmul", "mm", "bmm", "__matmul__"):
        setattr(torch.Tensor, name, _in_float32(getattr(torch.Tensor, name)))
    torch.nn.functional.linear = _in_float32(torch.nn.functional.linear)


def _in_float32(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Autograd goes through the casts, so that gradients are products in float32 as well."""

    @wraps(product)
    def rounded_once(*factors: Any, **options: Any) -> torch.Tensor:
        if "out" in options or not all(_is_bf16(f) for f in factors if f is not None):
            return product(*factors, **options)
        wide = (None if factor is None else factor.float() for factor in factors)
        return product(*wide, **options).bfloat16()

    return rounded_once


def _is_bf16(factor: Any) -> bool:
    return isinstance(factor, torch.Tensor) and factor.dtype is torch.bfloat16

"""Stands in for the package ``grouped_gemm``: one torch matmul an expert, in its order.

Kept: the function ``gmm`` and its shapes. Not kept: the CUDA kernel, and so its rounding.
"""

from __future__ import annotations

import types
from typing import Any

import torch


def gmm(
    tokens: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool = False
) -> torch.Tensor:
    """``tokens`` (T, K) in runs of ``counts`` by expert, times that expert's matrix of ``weights``
    (E, K, N), or (E, N, K) with ``trans_b``; (T, N)."""
    runs = tokens.split(counts.tolist())
    matrices = weights.transpose(1, 2) if trans_b else weights
    return torch.cat([run @ matrix for run, matrix in zip(runs, matrices, strict=True)])


def install() -> None:
    """Call after the stand-in for CUDA."""
    from megatron.core.transformer.moe import grouped_gemm_util

    module: Any = grouped_gemm_util
    module.ops = types.SimpleNamespace(gmm=gmm)
    module.grouped_gemm = types.SimpleNamespace(ops=module.ops)
    module.grouped_gemm_is_available = lambda: True
    module.assert_grouped_gemm_is_available = lambda: None

"""An independent merge to compare with: PyTorch's loader, numpy float64, rounding by distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

RUNS = Path(__file__).parent / "data" / "runs"
FRONTIER = RUNS.parent / "frontier"
"""Runs of optimizers and precisions beyond Adam on bf16 weights; iterations 6 and 8."""


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as ``torch.distributed.checkpoint`` loads it."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.full(entry.size, 7, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader)
    return state


def weighted_sum64(coefficients: Sequence[float], tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Products and sums in float64, oldest first."""
    total = None
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        output = np.float64(coefficient) * tensor.double().numpy()
        total = output if total is None else total + output
    assert total is not None
    return total


def rebuilt(model: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """float32 main params from bfloat16 weights and int16 remainders (integers of any dtype).

    ``multi_tensor_adam.cu`` of Transformer Engine: where the remainder is negative the weight was
    rounded up, which is undone; then they are the high and the low half of the bits.
    """
    low = remainder.to(torch.int16).numpy().copy()
    high = model.contiguous().view(torch.int16).numpy().view(np.uint16).copy()
    high[low < 0] -= np.uint16(1)
    bits = (high.astype(np.uint32) << np.uint32(16)) | low.view(np.uint16)
    return torch.from_numpy(bits.view(np.float32))


def split(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other way: bfloat16 weights, rounded half up, and int16 remainders."""
    bits = value.contiguous().numpy().view(np.uint32)
    low = (bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)
    high = (bits >> np.uint32(16)).astype(np.uint16)
    high[low < 0] += np.uint16(1)
    weights = torch.from_numpy(high.view(np.int16)).view(torch.bfloat16)
    return weights, torch.from_numpy(low)


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Float64 to ``dtype`` in one rounding, to nearest, ties to even."""
    if dtype == torch.float32:
        return torch.from_numpy(values.astype(np.float32))
    if dtype == torch.float16:
        return torch.from_numpy(values.astype(np.float16))  # numpy rounds float64 once
    assert dtype == torch.bfloat16
    # The two bfloat16 neighbours by cutting the float64's bits, then the nearer one.
    bits = values.view(np.uint64)
    below = bits & ~np.uint64((1 << 45) - 1)
    above = below + np.uint64(1 << 45)
    low, high = below.view(np.float64), above.view(np.float64)
    to_low, to_high = np.abs(values - low), np.abs(high - values)
    odd = (below >> np.uint64(45)) & np.uint64(1) == 1
    up = (to_high < to_low) | ((to_high == to_low) & odd)
    nearest = np.where(up, high, low)
    tiny = np.abs(nearest) < 2.0**-126
    assert not (tiny & (nearest != 0)).any(), "subnormal bfloat16: not covered by this reference"
    return torch.from_numpy(nearest).to(torch.bfloat16)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)

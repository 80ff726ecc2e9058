"""The CUDA path: one Triton kernel that reads every source once and keeps the sums in registers.

Why memory is the limit, on an H200 (132 SMs at 1.98 GHz; a copy moves about 4.3 TB/s): there is
memory time for 2.15e12 bf16 source elements a second. Each must be converted to float64, of which
an SM does 16 a clock (4.2e12/s: 51 % busy), and takes two float64 instructions for each output,
because output and sum may not be fused, of which an SM does 64 a clock (16.7e12/s: 26 % busy for
each output). So memory is the limit for any n up to m = 3; at m = 4 and large n the float64 pipe
is at 103 % and takes over. float32 sources move twice the bytes for the same arithmetic. (Rates
by NVIDIA's throughput tables for compute capability 9.0: arithmetic, not a measurement.)
"""

# Triton's dialect of Python: constants in capitals, no type hints, tuples grow by addition.
# ruff: noqa: N803, RUF005
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm_megatron.kernels import reference

NUM_WARPS = 4
_launching = threading.Lock()
"""Triton's just-in-time compiler is not meant for several threads."""
#: The kernel is unrolled over its sources and outputs. What does not fit into the registers takes
#: several passes over the sources, or, above MAX_SOURCES, the torch path.
MAX_SOURCES = 64


def block_size(m: int) -> int:
    """Elements of a program: 8 or 4 for each of its threads."""
    return 1024 if m <= 2 else 512


def outputs_per_pass(n: int) -> int:
    return 4 if n <= 32 else 1


def bind(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> Callable[[], bool | Tensor]:
    """See :func:`wsm_megatron.kernels.bind`; arguments are taken as checked."""
    if len(sources) > MAX_SOURCES:
        return reference.bind(sources, coefficients, outputs)
    return lambda: launch(sources, coefficients, outputs) == 0


def launch(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> Tensor:
    """Starts the weighted sum on the current stream, without waiting for it.

    Returns:
        int32 tensor of one element on the device: not zero when a value written is not finite.
    """
    device = outputs[0].device
    stored_sources = tuple(map(_as_stored, sources))
    step = outputs_per_pass(len(sources))
    with _launching, torch.cuda.device_of(outputs[0]):
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        for k in range(0, len(outputs), step):
            rows = _on_device(tuple(map(tuple, coefficients[k : k + step])), device)
            _launch_pass(stored_sources, tuple(map(_as_stored, outputs[k : k + step])), rows, flag)
    return flag


def _launch_pass(
    sources: tuple[Tensor, ...], outputs: tuple[Tensor, ...], rows: Tensor, flag: Tensor
) -> None:
    numel, block = outputs[0].numel(), block_size(len(outputs))
    # Whole blocks go without a mask, which would cost them their 16-byte loads.
    for programs, masked in ((numel // block, False), (int(numel % block > 0), True)):
        if programs:
            weighted_sum_kernel[(programs,)](
                sources,
                outputs,
                rows,
                flag,
                numel,
                BLOCK=block,
                MASKED=masked,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


def _as_stored(tensor: Tensor) -> Tensor:
    """bfloat16 goes to the kernel as int16: its conversions are done on the bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@lru_cache(maxsize=64)
def _on_device(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    coefficients = torch.tensor(rows, dtype=torch.float64).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # later calls may be on another stream
    return coefficients


@triton.jit(do_not_specialize=["numel"])
def weighted_sum_kernel(
    sources, outputs, coefficients, flag, numel, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """One program sums one block: of the whole blocks, or, masked, the part of one after them."""
    n: tl.constexpr = len(sources)
    m: tl.constexpr = len(outputs)
    block = numel // BLOCK if MASKED else tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel if MASKED else None
    sums = ()
    for j in tl.static_range(n):
        x = _to_float64(tl.load(sources[j] + at, mask=inside))
        next_sums = ()
        for k in tl.static_range(m):
            term = tl.load(coefficients + k * n + j) * x
            if j > 0:
                term = sums[k] + term
            next_sums = next_sums + (term,)
        sums = next_sums
    bad = tl.zeros([BLOCK], dtype=tl.int1)
    for k in tl.static_range(m):
        rounded = _round_once(sums[k], outputs[k].dtype.element_ty)
        bad = bad | ~_is_finite(rounded)
        tl.store(outputs[k] + at, rounded, mask=inside)
    if MASKED:
        bad = bad & inside
    tl.store(flag + tl.zeros([BLOCK], dtype=tl.int32), 1, mask=bad)


@triton.jit
def _to_float64(x):
    if x.dtype == tl.int16:  # bf16: the upper half of a float32
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64)


@triton.jit
def _round_once(value, dtype: tl.constexpr):
    """See :func:`wsm_megatron.kernels.reference.round_once`."""
    if dtype == tl.int16 or dtype == tl.float16:
        low: tl.constexpr = (1 << 39) - 1
        bits = value.to(tl.int64, bitcast=True)
        bits = (bits | ((bits & low) + low)) & ~low
        value = bits.to(tl.float64, bitcast=True).to(tl.float32)
    if dtype == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def _is_finite(x):
    if x.dtype == tl.int16:
        finite = (x & 0x7FFF) < 0x7F80
    else:
        finite = tl.abs(x) < float("inf")
    return finite

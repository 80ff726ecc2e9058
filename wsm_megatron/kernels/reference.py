"""The weighted sum in plain torch operations, block by block.

Needs no compiler, runs on CPU and CUDA, and is what the faster paths must agree with, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

#: Elements of a block. On a CPU the float64 accumulator and the scratch (128 KiB each) stay in an
#: L2 cache, and torch works on so few elements in the calling thread alone.
CPU_BLOCK = 1 << 14
CUDA_BLOCK = 1 << 24

#: The bits of a float64 below its 14 most significant ones.
LOW_BITS = (1 << 39) - 1


def bind(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> Callable[[], bool]:
    """See :func:`wsm_megatron.kernels.bind`; arguments are taken as checked."""
    return partial(weighted_sum, sources, coefficients, outputs)


@torch.no_grad()
def weighted_sum(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> bool:
    """See :func:`wsm_megatron.kernels.weighted_sum`; arguments are taken as checked."""
    numel, device = outputs[0].numel(), outputs[0].device
    block = CPU_BLOCK if device.type == "cpu" else CUDA_BLOCK
    acc, term = torch.empty(2, min(block, numel), dtype=torch.float64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for first in range(0, numel, block):
        part = slice(first, min(first + block, numel))
        size = part.stop - part.start
        for row, output in zip(coefficients, outputs, strict=True):
            _sum_block([source[part] for source in sources], row, acc[:size], term[:size])
            written = output[part].copy_(round_once(acc[:size], output.dtype))
            finite &= written.isfinite().all()
    return bool(finite)


def _sum_block(sources: Sequence[Tensor], row: Sequence[float], acc: Tensor, term: Tensor) -> None:
    acc.copy_(sources[0]).mul_(row[0])
    for source, coefficient in zip(sources[1:], row[1:], strict=True):
        acc.add_(term.copy_(source).mul_(coefficient))


def rebuild_main(model: Tensor, remainder: Tensor) -> Tensor:
    """float32 from its bfloat16 high bits, rounded half up, and its low 16 bits, as Transformer
    Engine's fused Adam does before a step: the rounding is undone where the remainder is negative.
    """
    low = remainder.to(torch.int64)
    high = model.view(torch.int16).to(torch.int64) - (low < 0).to(torch.int64)
    bits = (high % 2**16) * 2**16 + low % 2**16
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def split_main(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 high bits, rounded half up, and the signed low 16 bits (int64) of float32."""
    bits = value.view(torch.int32).to(torch.int64) % 2**32
    low = (bits % 2**16 + 2**15) % 2**16 - 2**15
    high = (bits // 2**16 + (low < 0).to(torch.int64) + 2**15) % 2**16 - 2**15
    return high.to(torch.int16).view(torch.bfloat16), low


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 ``values`` in ``dtype``, with a single rounding to nearest, ties to even.

    torch converts float64 to bfloat16 and float16 through float32 and so may round twice. Here
    the value is first rounded to 14 significant bits and to odd: an inexact one gets a last bit of
    1, which keeps it off every tie of the narrower format. float32 holds that exactly, and the
    last conversion decides as if it saw the float64 value (Boldo and Melquiond, "Emulation of a
    FMA and Correctly Rounded Sums", IEEE Trans. Computers, 2008).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    bits = values.view(torch.int64)
    odd = bits.bitwise_and(LOW_BITS).add_(LOW_BITS)  # carries into bit 39 unless the value is exact
    odd.bitwise_or_(bits).bitwise_and_(~LOW_BITS)
    return odd.view(torch.float64).to(torch.float32).to(dtype)

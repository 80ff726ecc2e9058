"""What every path of the weighted sum must do, against Python fractions and numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64)
WeightedSum = Callable[[Sequence[Tensor], Sequence[Sequence[float]], Sequence[Tensor]], bool]

#: Significant bits and the exponent of the smallest subnormal.
FORMATS = {BF16: (8, -133), FP16: (11, -24), FP32: (24, -149), FP64: (53, -1074)}


def nearest(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded once, to nearest even, in exact arithmetic."""
    if value == 0 or not math.isfinite(value):
        return value
    bits, smallest = FORMATS[dtype]
    unit = Fraction(2) ** max(math.frexp(value)[1] - bits, smallest)
    rounded = round(Fraction(value) / unit) * unit  # Python rounds a fraction's half to even
    if abs(rounded) > torch.finfo(dtype).max:
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def expected(sources: Sequence[Tensor], row: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The contract in numpy float64, which does not fuse, and exact rounding."""
    total = None
    with np.errstate(all="ignore"):
        for coefficient, source in zip(row, sources, strict=True):
            output = np.float64(coefficient) * wide(source)
            total = output if total is None else total + output
    assert total is not None
    return torch.tensor([nearest(float(value), dtype) for value in total], dtype=FP64).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    """As float64, without torch's own conversions."""
    tensor = tensor.cpu()
    if tensor.dtype == BF16:
        halves = tensor.view(torch.int16).numpy().view(np.uint16)
        with np.errstate(invalid="ignore"):
            return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return tensor.numpy().astype(np.float64)


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits; any NaN equals any NaN."""
    got, want = got.cpu(), want.cpu()
    nan = want.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    equal = got.view(integers)[~nan] == want.view(integers)[~nan]
    return got.dtype == want.dtype and bool(equal.all()) and bool(got[nan].isnan().all())


def check(
    weighted_sum: WeightedSum,
    sources: Sequence[Tensor],
    coefficients: Sequence[Sequence[float]],
    dtypes: Sequence[torch.dtype],
    device: str = "cpu",
) -> None:
    """Runs a path on ``device`` and compares outputs and the returned flag."""
    size = sources[0].numel()
    outputs = [torch.full((size,), 7, dtype=dtype, device=device) for dtype in dtypes]
    finite = weighted_sum([source.to(device) for source in sources], coefficients, outputs)
    wanted = [expected(sources, *each) for each in zip(coefficients, dtypes, strict=True)]
    for output, want in zip(outputs, wanted, strict=True):
        assert same(output, want)
    assert finite is all(bool(want.isfinite().all()) for want in wanted)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65536 values of a 16-bit dtype, NaNs included."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def every_pattern_converts(weighted_sum: WeightedSum, device: str = "cpu") -> None:
    for dtype in (BF16, FP16):
        source = patterns(dtype)
        outputs = [torch.full((65536,), 7, dtype=d, device=device) for d in (dtype, FP64)]
        assert weighted_sum([source.to(device)], [[1.0], [1.0]], outputs) is False
        assert same(outputs[0], source)
        assert same(outputs[1], torch.from_numpy(wide(source)))


def every_tie_rounds_to_even(weighted_sum: WeightedSum, device: str = "cpu") -> None:
    """Halfway between all neighbours, subnormals and the step to infinity included, and the
    float64 values next to it on both sides."""
    for dtype, beyond in ((BF16, 2.0**128), (FP16, 65536.0)):
        values = wide(patterns(dtype)[:32768])
        last = int(np.isfinite(values).sum())  # the pattern of infinity
        values[last] = beyond
        low, high = values[:last], values[1 : last + 1]
        tie = (low + high) / 2
        index = np.arange(last)
        cases = (
            (np.nextafter(tie, 0), index),
            (tie, index + index % 2),
            (np.nextafter(tie, np.inf), index + 1),
        )
        for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
            for value, pattern in cases:
                source = torch.from_numpy(value).to(device)
                output = torch.full((last,), 7, dtype=dtype, device=device)
                finite = weighted_sum([source], [[sign]], [output])
                want = torch.from_numpy((pattern | bit).astype(np.uint16).view(np.int16))
                assert torch.equal(output.cpu().view(torch.int16), want)
                assert finite is bool((pattern < last).all())


def random_mixes(weighted_sum: WeightedSum, sizes: Sequence[int], device: str = "cpu") -> None:
    """n, m, dtypes and magnitudes mixed, subnormals and overflow to infinity among them."""
    generator = torch.Generator().manual_seed(0)
    for case, size in enumerate(sizes):
        n, m = 1 + case % 9, 1 + case % 5
        kinds = torch.randint(4, (n + m,), generator=generator).tolist()
        sources = [spread(size, DTYPES[kind], generator) for kind in kinds[:n]]
        rows = torch.randn(m, n, dtype=FP64, generator=generator).tolist()
        check(weighted_sum, sources, rows, [DTYPES[kind] for kind in kinds[n:]], device)


def spread(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    exponents = torch.randint(-30, 18, (size,), generator=generator, dtype=FP64)
    if dtype != FP16:
        exponents *= 5
    values = torch.randn(size, dtype=FP64, generator=generator) * torch.exp2(exponents)
    return values.to(dtype)


def no_fused_multiply_add(weighted_sum: WeightedSum, device: str = "cpu") -> None:
    """(1 + e)(1 + e) - 1 is 2 e once the output is rounded, and 2 e + e e if it is not."""
    e = 2.0**-30
    sources = [torch.full((1500,), value, dtype=FP64, device=device) for value in (1.0, 1 + e)]
    for count in (1, 2, 6):  # outputs
        outputs = [torch.empty_like(sources[0]) for _ in range(count)]
        assert weighted_sum(sources, [[-1.0, 1 + e]] * count, outputs)
        assert all(set(output.tolist()) == {2 * e} for output in outputs)


CASES = (every_pattern_converts, every_tie_rounds_to_even, no_fused_multiply_add)

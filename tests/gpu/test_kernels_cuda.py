from __future__ import annotations

import pytest
import torch

from tests import kernel_cases as cases
from tests.kernel_cases import BF16, FP16, FP32
from wsm_megatron.kernels import backend, reference, weighted_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATHS = pytest.mark.parametrize("path", [weighted_sum, reference.weighted_sum])


def test_backend_is_triton():
    assert backend("cuda") == "triton: the fused CUDA kernel"


@PATHS
@pytest.mark.parametrize("case", cases.CASES)
def test_case(path, case):
    case(path, "cuda")


@PATHS
def test_sizes_and_mixed_dtypes(path):
    cases.random_mixes(path, [1, 511, 512, 1024, 1025, 2500, 64, 3, 7, 20000], "cuda")


@pytest.mark.parametrize("n", [2, 8, 32, 33, 64, 65])
@pytest.mark.parametrize("m", [1, 3, 4, 5])
def test_cpu_and_cuda_give_the_same_bits(n, m):
    generator = torch.Generator().manual_seed(n * 10 + m)
    dtypes = [(BF16, FP16, FP32)[j % 3] for j in range(n)]
    sources = [cases.spread(100_003, dtype, generator) for dtype in dtypes]
    rows = torch.randn(m, n, generator=generator).tolist()
    kinds = [(BF16, FP32, FP16)[k % 3] for k in range(m)]
    on_cpu = [torch.empty(100_003, dtype=kind) for kind in kinds]
    on_cuda = [torch.empty(100_003, dtype=kind, device="cuda") for kind in kinds]
    finite = weighted_sum(sources, rows, on_cpu)
    assert weighted_sum([source.cuda() for source in sources], rows, on_cuda) is finite
    for left, right in zip(on_cpu, on_cuda, strict=True):
        assert cases.same(right, left)


def test_unaligned_start():
    source = torch.randn(5001, device="cuda").bfloat16()[1:]
    output = torch.empty(5001, device="cuda", dtype=BF16)[1:]
    assert weighted_sum([source, source], [[0.75, 0.25]], [output])
    assert cases.same(output, source)


def test_other_stream_is_ordered():
    stream = torch.cuda.Stream()
    source = torch.zeros(1 << 24, device="cuda")
    output = torch.empty_like(source)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        source.fill_(3.0)
        assert weighted_sum([source], [[2.0]], [output])
    assert bool((output == 6.0).all())

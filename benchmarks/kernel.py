"""The weighted sum against a plain copy and against eager accumulation, in one run: one table.

    python benchmarks/kernel.py [--device cpu|cuda] [--threads 1 2] [--numel N] [--clock wall|cpu]

Eager is ``acc.add_(x, alpha=c)`` for each source and output, then a copy to the output's dtype:
with a float64 accumulator (closest to what the kernel computes), with a float32 one, and with a
float32 one and sources converted first, as Megatron-LM's weighted_merge.py does. GB/s count each
source and each output once; a copy's GB/s count what it reads and what it writes. Times are the
least of several rounds, in which the candidates take turns. ``--clock cpu`` counts the CPU time
of the process instead of wall time: for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from wsm_megatron.kernels import backend, weighted_sum

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: Sources' dtypes (repeated to n), outputs' dtype, n, m.
CPU_CASES = [
    ([BF16], BF16, 2, 1),
    ([BF16], BF16, 8, 1),
    ([BF16], BF16, 8, 4),
    ([BF16], BF16, 32, 1),
    ([BF16], FP32, 8, 1),
    ([FP16], FP16, 8, 1),
    ([FP32], FP32, 8, 1),
    ([FP32], FP32, 8, 4),
    ([BF16, FP32], BF16, 8, 1),
]
CUDA_CASES = [
    ([dtype], dtype, n, m) for dtype in (BF16, FP32) for n in (2, 4, 8, 16, 32) for m in (1, 2, 4)
] + [([FP16], FP16, 8, 1), ([BF16], FP32, 8, 1), ([BF16, FP32], BF16, 8, 1)]
HEADER = (
    "| sources | outputs | threads | kernel ms | GB/s | copy GB/s | of copy "
    "| eager fp64 ms | eager fp32 ms | converted fp32 ms |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--numel", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    numel = args.numel or (1 << 27 if cuda else 1 << 23)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"torch {torch.__version__}, {name}, {numel} elements, {args.clock} time")
    print(backend(args.device))
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    timer = cuda_time if cuda else (time.process_time if args.clock == "cpu" else time.perf_counter)
    for threads in [1] if cuda else args.threads:
        torch.set_num_threads(threads)
        for case in CUDA_CASES if cuda else CPU_CASES:
            print(row(case, numel, args.device, threads, args.rounds, timer), flush=True)


def cuda_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def row(case, numel: int, device: str, threads: int, rounds: int, timer) -> str:
    dtypes, kind, n, m = case
    sources = [torch.randn(numel, device=device).to(dtypes[j % len(dtypes)]) for j in range(n)]
    outputs = [torch.empty(numel, dtype=kind, device=device) for _ in range(m)]
    rows = torch.rand(m, n, dtype=FP64).tolist()
    size = sum(t.nbytes for t in (*sources, *outputs))
    copy_from = torch.ones(size // 2, dtype=torch.uint8, device=device)  # as many bytes moved
    copy_to = torch.empty_like(copy_from)
    wide, single = (torch.empty(numel, dtype=dtype, device=device) for dtype in (FP64, FP32))
    with ThreadPoolExecutor(threads) as pool:
        kernel, copy, *eagers = fastest(
            [
                lambda: in_parts(pool, threads, sources, rows, outputs),
                lambda: copy_to.copy_(copy_from),
                lambda: eager(sources, rows, outputs, wide),
                lambda: eager(sources, rows, outputs, single),
                lambda: eager(sources, rows, outputs, single, convert=True),
            ],
            rounds,
            timer,
        )
    figures = [
        f"{n} {' + '.join(map(short, dtypes))}",
        f"{m} {short(kind)}",
        f"{threads}",
        f"{kernel * 1e3:.2f}",
        f"{size / kernel / 1e9:.1f}",
        f"{size / copy / 1e9:.1f}",
        f"{copy / kernel:.0%}",
        *(f"{seconds * 1e3:.1f} ({seconds / kernel:.1f}x)" for seconds in eagers),
    ]
    return f"| {' | '.join(figures)} |"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def fastest(
    candidates: Sequence[Callable[[], object]], rounds: int, timer: Callable[[], float]
) -> list[float]:
    """Seconds of each, the first round (compilation, page faults) not counted."""
    best = [float("inf")] * len(candidates)
    for turn in range(rounds + 1):
        for i, candidate in enumerate(candidates):
            start = timer()
            candidate()
            if turn:
                best[i] = min(best[i], timer() - start)
    return best


def in_parts(
    pool: ThreadPoolExecutor,
    threads: int,
    sources: Sequence[Tensor],
    rows: list[list[float]],
    outputs: Sequence[Tensor],
) -> None:
    """The kernel works on the calling thread, so each thread takes a part of every tensor."""
    parts = zip(*(tensor.chunk(threads) for tensor in (*sources, *outputs)), strict=True)
    n = len(sources)
    list(pool.map(lambda part: weighted_sum(part[:n], rows, part[n:]), parts))


def eager(
    sources: Sequence[Tensor],
    rows: list[list[float]],
    outputs: Sequence[Tensor],
    acc: Tensor,
    convert: bool = False,
) -> None:
    for coefficients, output in zip(rows, outputs, strict=True):
        acc.zero_()
        for coefficient, source in zip(coefficients, sources, strict=True):
            acc.add_(source.to(acc.dtype) if convert else source, alpha=coefficient)
        output.copy_(acc)


if __name__ == "__main__":
    main()

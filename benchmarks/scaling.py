"""How a merge scales: with sources, merges, ranks, threads and size. One table.

    python benchmarks/scaling.py [--gib 0.25] [--checkpoints 16] [--repeat 3]

Every row changes one thing of a base case (8 sources, one merge, one rank, the machine's threads);
page cache warm, Python's start and end not counted. The last column is ``cat`` of the same sources
in the same round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from generate import generate
from measure import merge, raw_read, where

DECAYS = ("mean", "linear", "1-sqrt", "ema")


def row(
    run: Path, scratch: Path, repeat: int, n: int = 8, m: int = 1, ranks: int = 1, threads: int = 0
) -> str:
    iterations = [1000 * (k + 1) for k in range(n)]
    options = ["--iterations", ",".join(map(str, iterations)), "--decay", ",".join(DECAYS[:m])]
    if threads:
        options += ["--threads", str(threads)]
    files = [f for i in iterations for f in sorted((run / f"iter_{i:07d}").glob("*.distcp"))]
    seconds, read, peak, moved = [], [], 0, 0
    for _ in range(repeat):
        shutil.rmtree(scratch / "out", ignore_errors=True)
        done = merge(run, scratch / "out", ranks, *options)
        report = done.report
        seconds.append(report["seconds"])
        moved, peak = report["bytes_read"] + report["bytes_written"], max(peak, done.peak)
        read.append(raw_read(files))
    median = statistics.median(seconds)
    size = sum(f.stat().st_size for f in files[: len(files) // n]) / 2**30
    return (
        f"| {size:.2f} GiB | {n} | {m} | {ranks} | {threads or 'all'} | {moved / 1e9:.2f} | "
        f"{median:.2f} | {moved / median / 1e9:.2f} | {peak / 2**20:.0f} | "
        f"{statistics.median(read):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.25)
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    print(where())
    print("| checkpoint | n | m | ranks | threads | GB moved | seconds | GB/s | peak MiB | cat s |")
    print("|---" * 10 + "|")
    with tempfile.TemporaryDirectory(prefix="wsm-bench-") as folder:
        scratch = Path(folder)
        run = scratch / "run"
        generate(run, given.checkpoints, given.gib, False, 2, False)
        cases = [{"n": n} for n in (2, 4, 8, 16)] + [{"m": m} for m in (2, 4)]
        cases += [{"ranks": r} for r in (2, 4)] + [{"threads": t} for t in (1, 2, 4)]
        for case in cases:
            print(row(run, scratch, given.repeat, **case), flush=True)
        for factor in (0.25, 4):
            other = scratch / f"run-{factor}"
            generate(other, 8, given.gib * factor, False, 2, False)
            print(row(other, scratch, given.repeat), flush=True)
            shutil.rmtree(other)


if __name__ == "__main__":
    main()

"""A sweep of many merges against one merge of the same sources, nothing written.

    python -m benchmarks.sweep [--checkpoints 12] [--gib 0.25] [--rounds 3] [--threads 2] [--cold]

Both read, check and sum; what they publish are files of the right size and no contents, so that
writing, which a sweep does that many times, is left out. Merges differ in decay and floor, not in
their sources: the most arithmetic for the fewest bytes. Seconds are of the process's CPUs and of
the wall, the least of several rounds in turns. ``--cold`` takes the sources out of the page cache
before each. The last column: where sources come slower than that, reading takes longer than the
sums, and the sweep at most 1.6 times as long as one merge.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.unwritten import Unwritten
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.execution import rank
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.run import sweep

_DECAYS = ("mean", "linear", "cosine", "1-sqrt", "ema", "exponential")
_FLOORS = {1: (0.0,), 6: (0.0,), 12: (0.0, 0.1), 24: (0.0, 0.05, 0.1, 0.2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--gib", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    rank.CheckpointFile = Unwritten  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="wsm-sweep-") as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "benchmarks.generate", run, "--gib", arguments.gib]
        command += ["--checkpoints", arguments.checkpoints]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        least: dict[int, tuple[float, float, int]] = {}
        for _ in range(arguments.rounds):
            for count in _FLOORS:
                if arguments.cold:
                    _forget(run)
                found = _measured(run, Path(folder, "out"), count, arguments.threads)
                before = least.get(count, found)
                least[count] = (*map(min, found[:2], before[:2]), found[2])  # type: ignore[assignment]
    print("| merges | bytes read | CPU s | x one | wall s | x one | within 1.6 below |")
    print("|---|---|---|---|---|---|---|")
    one_cpu, one_wall, one_read = least[1]
    for count, (cpu, wall, read) in least.items():
        assert read == one_read, "each source byte once"
        rate = f"{1.6 * read / (cpu / arguments.threads) / 1e9:.1f} GB/s" if count > 1 else ""
        print(
            f"| {count} | {read / 1e9:.2f} GB | {cpu:.2f} | {cpu / one_cpu:.2f} | {wall:.2f} "
            f"| {wall / one_wall:.2f} | {rate} |"
        )


def _forget(run: Path) -> None:
    """Take a run's files out of the page cache."""
    for file in run.rglob("*.distcp"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measured(run: Path, out: Path, count: int, threads: int) -> tuple[float, float, int]:
    """CPU and wall seconds, and the bytes read."""
    execution = ExecutionOptions(threads=threads, device="cpu")
    config = MergeConfig(load=run, save=out)
    cpu, wall = time.process_time(), time.perf_counter()
    if count == 1:
        read = merge(config, execution).bytes_read
    else:
        done = sweep(Sweep(config, SweepGrid(decay=_DECAYS, min_decay=_FLOORS[count])), execution)
        assert done is not None and len(done.merges) == count
        read = done.bytes_read
    took = time.process_time() - cpu, time.perf_counter() - wall
    shutil.rmtree(out)
    return (*took, read)


if __name__ == "__main__":
    main()

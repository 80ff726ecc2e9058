"""A merge against raw reading plus writing of the same bytes, in one run.

    python benchmarks/end_to_end.py [--checkpoints 8] [--gib 1] [--ranks 1,2] [--repeat 3]

Prints one table: seconds, GB/s and the ratio to the floor (``cat`` of the sources' files into
/dev/null, then writing and syncing as many bytes as the merged checkpoint has), all with the page
cache warm, and the peak resident memory of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generate import add_arguments, generate

_PIECE = 8 * 2**20


def timed(command: list[str]) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes of the largest process, output."""
    marker = ["/usr/bin/time", "-f", "peak %M"] if Path("/usr/bin/time").exists() else []
    start = time.perf_counter()
    done = subprocess.run([*marker, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    peaks = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("peak ")]
    return seconds, int(peaks[-1]) * 1024 if peaks else 0, done.stdout


def raw_read(files: list[Path]) -> float:
    with open(os.devnull, "wb") as sink:
        start = time.perf_counter()
        subprocess.run(["cat", *map(str, files)], stdout=sink, check=True)
        return time.perf_counter() - start


def raw_write(folder: Path, nbytes: int) -> float:
    data = os.urandom(_PIECE)
    path = folder / "raw"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(0, nbytes, _PIECE):
            stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def merge_command(run: Path, out: Path, ranks: int, options: list[str]) -> list[str]:
    arguments = ["-m", "wsm_megatron", "merge", "--load", str(run), "--save", str(out), "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), *arguments, *options]


def measure(run: Path, scratch: Path, ranks: list[int], repeat: int, options: list[str]) -> None:
    files = sorted(run.glob("iter_*/*.distcp"))
    size = sum(file.stat().st_size for file in files)
    raw_read(files)
    print(f"{len(files)} files, {size / 1e9:.2f} GB; {os.cpu_count()} cores; medians of {repeat}")
    print(f"{'':28} {'seconds':>8} {'GB/s':>7} {'x floor':>8} {'peak MiB':>9}")
    rows: dict[str, list[tuple[float, int]]] = {}
    moved = floor = 0.0
    floors = []
    for _ in range(repeat):
        for count in ranks:
            out = scratch / "out"
            seconds, peak, text = timed(merge_command(run, out, count, options))
            report = json.loads(text.strip().splitlines()[-1])
            moved = report["bytes_read"] + report["bytes_written"]
            rows.setdefault(f"wsm merge, {count} rank(s)", []).append((seconds, peak))
            rows.setdefault(f"  of it merging, {count} rank(s)", []).append((report["seconds"], 0))
            shutil.rmtree(out)
        read, write = raw_read(files), raw_write(scratch, report["bytes_written"])
        rows.setdefault("cat", []).append((read, 0))
        rows.setdefault("raw write and sync", []).append((write, 0))
        floors.append(read + write)
    floor = statistics.median(floors)
    for name, values in rows.items():
        seconds = statistics.median(value[0] for value in values)
        peak = max(value[1] for value in values)
        shown = f"{peak / 2**20:9.0f}" if peak else ""
        print(
            f"{name:28} {seconds:8.2f} {moved / seconds / 1e9:7.2f} {seconds / floor:8.2f} {shown}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="where the run is, or is generated")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--repeat", type=int, default=3)
    add_arguments(parser)
    given, options = parser.parse_known_args()
    ranks = [int(part) for part in given.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="wsm-bench-") as folder:
        run = given.run or Path(folder) / "run"
        generate(run, given.checkpoints, given.gib, given.moe, given.tp, given.optimizer)
        measure(run, Path(folder), ranks, given.repeat, options)


if __name__ == "__main__":
    main()

"""What the benchmarks share: ranks as processes, raw reading and writing of files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PIECE = 8 * 2**20
_LOOK = 0.02
"""Seconds between two looks at the processes: how exact times are."""


@dataclass(frozen=True)
class Run:
    """A command on one or several ranks.

    Attributes:
        seconds: from the first process's start to the last one's end.
        peak: resident bytes of the largest process; the page cache does not count.
        output: of rank 0.
    """

    seconds: float
    peak: int
    output: str

    @property
    def report(self) -> dict[str, Any]:
        """The last line of output, of ``--json``."""
        return json.loads(self.output.strip().splitlines()[-1])


def launch(command: list[str], ranks: int = 1) -> Run:
    """Run ``python COMMAND`` on every rank.

    The ranks find each other by the environment, as under srun: a launcher's own start is not
    measured.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.sync()  # what ran before leaves nothing to write
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **_environment(rank, ranks, port)},
                stdout=output if rank == 0 else subprocess.DEVNULL,
                stderr=errors,
            )
            for rank in range(ranks)
        ]
        peak = 0
        while any(process.poll() is None for process in processes):
            peak = max(peak, *(_peak(process.pid) for process in processes))
            time.sleep(_LOOK)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if any(process.returncode for process in processes):
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()}")
        return Run(seconds, peak, output.read())


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in found.items()}}


def _peak(pid: int) -> int:
    """The most resident bytes that a process or one that it forked has had."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    found = [line for line in status.splitlines() if line.startswith("VmHWM")]
    own = int(found[0].split()[1]) * 1024 if found else 0
    return max(own, *(_peak(int(child)) for child in children), 0)


def merge(run: Path, out: Path, ranks: int, *options: str) -> Run:
    """``wsm merge``, which starts its ranks itself."""
    where = ["--load", str(run), "--save", str(out), "--json"]
    several = ["--local-ranks", str(ranks)] if ranks > 1 else []
    return launch(["-m", "wsm_megatron", "merge", *where, *several, *options])


def raw_read(files: list[Path]) -> float:
    """Seconds of ``cat`` into nothing."""
    with open(os.devnull, "wb") as sink:
        start = time.perf_counter()
        subprocess.run(["cat", *map(str, files)], stdout=sink, check=True)
        return time.perf_counter() - start


def raw_write(folder: Path, nbytes: int) -> float:
    """Seconds to write and sync one file."""
    data = os.urandom(_PIECE)
    path = folder / "raw"
    os.sync()
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(0, nbytes, _PIECE):
            stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def where() -> str:
    """The machine, for a table's head."""
    import torch

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    machine = f"{model}, {cores} cores, {memory:.0f} GiB, {gpu}"
    return f"{machine}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"

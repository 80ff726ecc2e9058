"""Start gloo ranks on this machine and wait for all of them."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank failed or the ranks took too long; the message holds the end of their output."""


def run_ranks(
    function: Callable[..., Any],
    nproc: int,
    folder: str | Path,
    *,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
    echo: bool = False,
    cuda_standin: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(**kwargs)`` in ``nproc`` new processes joined by gloo.

    function: module-level, in a module importable from the repository; it imports
        megatron-core inside its body if this process should stay without it.
    folder: gets a fresh sub-folder with the ranks' logs and results.
    timeout: seconds for all ranks together.
    env: more environment variables for the ranks.
    echo: the ranks write to this process's stdout and stderr instead of log files.
    cuda_standin: megatron-core can be used in the ranks; without, they are plain gloo ranks.

    Returns the results by rank. Raises RankError when a rank fails (the others are killed at
    once) or when the time is over.
    """
    folder = _new_folder(Path(folder), function.__name__)
    call = folder / "call.pickle"
    call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, kwargs)))
    # Short, as the sockets that checkpoint writers put there may have only some 100 characters.
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        environment = _environment(Path(temporary), nproc) | (env or {})
        if cuda_standin:
            environment["CUDA_STANDIN"] = "1"
        ranks = [_start(rank, call, folder, environment, echo) for rank in range(nproc)]
        try:
            _wait(ranks, folder, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                _kill(process)
    return [pickle.loads((folder / f"result{rank}.pickle").read_bytes()) for rank in range(nproc)]


def _new_folder(parent: Path, name: str) -> Path:
    for number in range(10_000):
        folder = parent / f"{name}-{number}"
        if not folder.exists():
            folder.mkdir(parents=True)
            return folder
    raise RankError(f"too many runs in {parent}")


def _environment(temporary: Path, nproc: int) -> dict[str, str]:
    return os.environ | {
        "STORE": str(temporary / "store"),  # a file, not a port: nobody can take it in between
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def _start(
    rank: int, call: Path, folder: Path, environment: dict[str, str], echo: bool
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "examples.cpu_ranks.rank"]
    command += [str(call), str(folder / f"result{rank}.pickle")]
    environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with (folder / f"rank{rank}.log").open("wb") as log:
        output = None if echo else log
        return subprocess.Popen(
            command,
            env=environment,
            cwd=_REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that a rank dies together with what it spawned
        )


def _wait(
    ranks: list[subprocess.Popen[bytes]], folder: Path, deadline: float, timeout: float
) -> None:
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll()]
        if failed:
            break
        if time.monotonic() > deadline:
            raise RankError(f"ranks still running after {timeout:.0f} s\n{_tails(ranks, folder)}")
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
    if failed:
        code = ranks[failed[0]].returncode
        raise RankError(f"rank {failed[0]} ended with {code}\n{_tails(ranks, folder, failed)}")


def _tails(
    ranks: list[subprocess.Popen[bytes]], folder: Path, which: list[int] | None = None
) -> str:
    tails = []
    for rank in range(len(ranks)) if which is None else which:
        text = (folder / f"rank{rank}.log").read_text(errors="replace")
        tails.append(f"--- end of rank {rank}'s output ---\n{text[-6000:]}")
    return "\n".join(tails)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole session has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""Start gloo ranks on this machine and wait for all of them."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.cpu_ranks.rank import Call

_REPOSITORY = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank failed or the ranks took too long; the message holds the end of their output."""


def run_ranks(
    function: Callable[..., Any],
    nproc: int,
    folder: str | Path,
    *,
    timeout: float = 300.0,
    echo: bool = False,
    cuda_standin: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(**kwargs)`` in ``nproc`` new processes joined by gloo.

    They are forked from a process that has imported torch and megatron-core (server.py), which is
    started by the first call. So all ranks share the seed of Python's hashes.

    function: module-level, in a module importable from the repository; it imports
        megatron-core inside its body if this process should stay without it.
    folder: gets a fresh sub-folder with the ranks' logs and results.
    timeout: seconds for all ranks together.
    echo: the ranks write to this process's stdout and stderr instead of log files.
    cuda_standin: megatron-core can be used in the ranks; without, they are plain gloo ranks.

    Returns the results by rank. Raises RankError when a rank fails (the others are killed at
    once) or when the time is over.
    """
    folder = _new_folder(Path(folder), function.__name__)
    file = folder / "call.pickle"
    file.write_bytes(pickle.dumps((function.__module__, function.__qualname__, kwargs)))
    # Short, as the sockets that checkpoint writers put there may have only some 100 characters.
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        call = Call(
            file=file,
            nproc=nproc,
            folder=folder,
            environment=_environment(Path(temporary), nproc),
            echo=echo,
            timeout=timeout,
        )
        _raise_failure(_server(cuda_standin).run(call), call)
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
        **_FOR_IMPORTS,
    }


_FOR_IMPORTS = {
    "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


class _Server:
    """The process that forks ranks; it ends with this one."""

    def __init__(self, cuda_standin: bool):
        self._connection, theirs = multiprocessing.Pipe()
        environment = os.environ | _FOR_IMPORTS
        if cuda_standin:
            environment["CUDA_STANDIN"] = "1"
        command = [sys.executable, "-W", "ignore", "-m", "examples.cpu_ranks.server"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            env=environment,
            cwd=_REPOSITORY,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # no Ctrl-C: it ends its ranks when this process is gone
        )
        theirs.close()
        atexit.register(self.close)

    def run(self, call: Call) -> list[int | None]:
        """The ranks' exit statuses, see server.py."""
        try:
            self._connection.send(call)
            return self._connection.recv()
        except BaseException as error:
            self.close()
            _server.cache_clear()  # an answer to this call is none to the next one
            if isinstance(error, (EOFError, BrokenPipeError)):
                raise RankError("the process that forks ranks has ended; see its output") from error
            raise

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


@functools.cache
def _server(cuda_standin: bool) -> _Server:
    return _Server(cuda_standin)


def _raise_failure(status: list[int | None], call: Call) -> None:
    """Raise RankError unless all ranks ended well."""
    failed = [rank for rank, code in enumerate(status) if code]
    # One that fails takes others along, which lose their connection to it: the first one is named.
    failed.sort(key=lambda rank: _last_said(call, rank))
    if failed:
        message = f"rank {failed[0]} ended with {status[failed[0]]}"
        raise RankError(f"{message}\n{_tails(call, failed)}")
    if None in status:
        message = f"ranks still running after {call.timeout:.0f} s"
        raise RankError(f"{message}\n{_tails(call, list(range(call.nproc)))}")


def _last_said(call: Call, rank: int) -> int:
    """When a rank wrote to its log for the last time; 0 where it has none."""
    log = call.folder / f"rank{rank}.log"
    return log.stat().st_mtime_ns if log.exists() else 0


def _tails(call: Call, ranks: list[int]) -> str:
    tails = []
    for rank in ranks:
        log = call.folder / f"rank{rank}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        tails.append(f"--- end of rank {rank}'s output ---\n{text[-6000:]}")
    return "\n".join(tails)

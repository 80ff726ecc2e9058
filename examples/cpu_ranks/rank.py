"""One rank, in a process that server.py has forked."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Call:
    """What ranks are to do.

    file: a pickle of ``(module, function, kwargs)``.
    nproc: how many ranks.
    folder: for the ranks' logs and results.
    environment: all of the ranks' environment but their numbers.
    echo: the ranks write to the server's stdout and stderr instead of log files.
    timeout: seconds for all ranks together.
    """

    file: Path
    nproc: int
    folder: Path
    environment: dict[str, str]
    echo: bool
    timeout: float


def main(call: Call, rank: int) -> None:
    """Be one rank: its result is pickled to ``folder/resultN.pickle``. Never returns."""
    os.setsid()  # so that a rank dies together with what it starts
    if not call.echo:
        _write_to(call.folder / f"rank{rank}.log")
    os.environ.clear()
    os.environ |= call.environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    tempfile.tempdir = None  # TMPDIR is another one
    status = 0
    try:
        result = _run(call.file)
        (call.folder / f"result{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: the other ranks of a failed one would only add their lost connections, and taking
    # torch apart takes a second.
    os._exit(status)


def _write_to(log: Path) -> None:
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)


def _run(call: Path) -> Any:
    """Join the gloo group of all ranks, call the function, leave the group."""
    import torch.distributed as dist

    if "megatron.core" in sys.modules:
        _fork_results_queue()
    module, function, kwargs = pickle.loads(call.read_bytes())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    result = getattr(importlib.import_module(module), function)(**kwargs)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _fork_results_queue() -> None:
    """The process through which megatron-core's checkpoint writers report.

    megatron-core would spawn it at the first save, which imports torch once more.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    fork = multiprocessing.get_context("fork")
    filesystem_async._results_queue = fork.Manager().Queue()

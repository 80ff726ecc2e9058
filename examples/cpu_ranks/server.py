"""Forks ranks: ``python -m examples.cpu_ranks.server DESCRIPTOR``, started by launch.py.

It imports torch, and with CUDA_STANDIN set megatron-core, once; a rank forked from it starts in
hundredths of a second instead of seconds. It starts no threads, so that it can be forked.

Calls come over the connection with that file descriptor, one after another; the exit statuses of
their ranks go back. When the connection is closed, the server ends its ranks and itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
from multiprocessing import connection
from multiprocessing.context import ForkProcess

from examples.cpu_ranks import rank
from examples.cpu_ranks.rank import Call


def serve(caller: connection.Connection) -> None:
    """Run call after call until the connection is closed."""
    while True:
        try:
            call = caller.recv()
        except EOFError:
            return
        caller.send(_run(call, caller))


def _run(call: Call, caller: connection.Connection) -> list[int | None]:
    """Exit statuses by rank, negative for a signal; None for a rank that was ended from here.

    That is when another one has failed, the time is over, or the caller is gone.
    """
    _import_once(call)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(call, n, caller)) for n in range(call.nproc)]
    try:
        for process in ranks:
            process.start()
        _wait(ranks, caller, time.monotonic() + call.timeout)
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            _end(process)


def _import_once(call: Call) -> None:
    """The module of the function, whose imports every rank would make anew. Where it cannot be
    imported, the ranks say so."""
    module, _, _ = pickle.loads(call.file.read_bytes())
    with contextlib.suppress(Exception):
        importlib.import_module(module)
        gc.freeze()


def _rank(call: Call, number: int, caller: connection.Connection) -> None:
    caller.close()  # the caller is to notice when the server is gone
    rank.main(call, number)


def _wait(ranks: list[ForkProcess], caller: connection.Connection, deadline: float) -> None:
    """Until all ranks have ended, one has failed, the time is over, or the caller is gone."""
    while None in (status := [process.exitcode for process in ranks]) and not any(status):
        # No sentinels: what a rank has started holds them open.
        if caller.poll(0.02) or time.monotonic() > deadline:
            return


def _end(process: ForkProcess) -> None:
    """Kill a rank and what it has started."""
    if process.pid is None:
        return  # a rank before it could not be started
    with contextlib.suppress(ProcessLookupError):  # all have ended, or its session has not begun
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


_LATER = (
    "examples.cpu_ranks.checkpoint",
    "megatron.core.dist_checkpointing.strategies.torch",
    "numpy.random",
    "torch._dynamo",
)
"""What a rank imports at the latest when it takes a step or saves, which takes two seconds."""


def _import(with_megatron: bool) -> None:
    import torch

    torch.set_num_threads(1)
    if with_megatron:
        from examples.cpu_ranks import bf16_products, cuda_standin

        cuda_standin.install()
        if bf16_products.is_slow():
            bf16_products.install()
        for name in _LATER:
            importlib.import_module(name)


if __name__ == "__main__":
    gc.disable()  # what is imported stays
    _import("CUDA_STANDIN" in os.environ)
    gc.freeze()
    gc.enable()
    serve(connection.Connection(int(sys.argv[1])))
    os._exit(0)  # taking torch apart takes a second

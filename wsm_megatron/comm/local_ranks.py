"""Ranks on this machine that the command starts itself: ``--local-ranks``.

They are forked once torch is imported, so many start in the time of one and share its memory.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from wsm_megatron.comm.launcher import launched_as
from wsm_megatron.errors import EXIT_FAILED, UsageError
from wsm_megatron.process.signals import ending_signals
from wsm_megatron.process.streams import finish, say_defect

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_PORT_BYTES = 4


def run_forked(ranks: int, main: Callable[[], int]) -> int:
    """Run ``main`` in a forked process for every rank, and wait for all.

    Each finds in its environment who it is, as under torchrun; the ranks meet at a store of this
    process. SIGTERM and SIGINT are passed on to them. Call it before CUDA or a thread has started.

    Args:
        main: its result is the exit status of its process.

    Returns:
        the first exit status that is not 0; 128 + n for a rank that signal n has ended.

    Raises:
        UsageError: this process is one of several ranks already.
    """
    launch = launched_as()
    if ranks < 1:
        raise UsageError(f"--local-ranks {ranks}: at least one")
    if launch is not None:
        raise UsageError(
            f"--local-ranks: this process is {launch} already; start more tasks, or unset "
            f"{' and '.join(launch.names)}"
        )
    reading, writing = os.pipe()
    processes = {_fork(number, ranks, main, reading, writing): number for number in range(ranks)}
    os.close(reading)

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)

    with ending_signals(pass_on):
        store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        os.write(writing, store.port.to_bytes(_PORT_BYTES, "little") * ranks)
        os.close(writing)
        return _wait(processes)


def _fork(rank: int, ranks: int, main: Callable[[], int], reading: int, writing: int) -> int:
    """Start one rank; its process number."""
    finish(0)  # nothing is printed twice
    if process := os.fork():
        return process
    status = EXIT_FAILED
    try:
        os.close(writing)
        port = os.read(reading, _PORT_BYTES)  # a pipe hands out so few bytes whole
        if port:  # otherwise the parent has died
            os.environ |= _environment(rank, ranks, int.from_bytes(port, "little"))
            # torch makes its thread pool anew after a fork, when it is first asked for: of two
            # threads that ask at once, one would be refused.
            torch.set_num_threads(torch.get_num_threads())
            status = main()
    except BaseException:
        say_defect()
    finally:
        os._exit(finish(status))


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets it for the ranks of one machine, with the store in another process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {"MASTER_ADDR": _HOST, **agent, **{k: str(v) for k, v in numbers.items()}}


def _wait(processes: dict[int, int]) -> int:
    """Wait for all; ranks by process number, from which the ended are removed.

    When a signal has ended one, the others need not find out by its silence: they are stopped.
    """
    first = 0
    while processes:
        process, how = os.wait()
        if process not in processes:
            continue
        rank, status = processes.pop(process), os.waitstatus_to_exitcode(how)
        if status < 0:
            logger.error("rank %d was ended by %s", rank, signal.Signals(-status).name)
            status = 128 - status
            for other in processes:
                os.kill(other, signal.SIGTERM)
        first = first or status
    return first

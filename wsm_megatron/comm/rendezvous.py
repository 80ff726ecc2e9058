"""Where the ranks of a launch meet: a key-value store that rank 0 (or torchrun's agent) holds.

Whoever waits here says for whom after a few seconds, and can be ended by a signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from wsm_megatron.comm.launcher import Launch
from wsm_megatron.errors import MergeError
from wsm_megatron.process.timeouts import timeouts

logger = logging.getLogger(__name__)

_LOOK = 0.1
_SHOWN = 8
_stores: dict[Launch, dist.Store] = {}


class Waiting:
    """Says, now and then, which ranks are waited for, and why."""

    def __init__(self, launch: Launch):
        self._launch = launch
        self._due = time.monotonic() + timeouts.say_missing_after

    def tell(self, missing: list[int]) -> None:
        """Say it where it is due."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + timeouts.say_missing_every
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        ranks = f"rank {shown}" if len(missing) == 1 else f"{len(missing)} ranks ({shown})"
        logger.warning(
            "%s: waiting for %s at %s:%d; %s",
            self._launch,
            ranks,
            self._launch.address,
            self._launch.port,
            self._launch.way_out,
        )


def connect(launch: Launch, waiting: Waiting) -> dist.Store:
    """The store that the ranks of a launch share, and no others. The same at every call.

    Torch connects in a thread of its own: its call heeds no signals.

    Raises:
        MergeError: rank 0 cannot listen, or did not do so in time.
    """
    if launch in _stores:
        return _stores[launch]
    replies: queue.SimpleQueue[dist.Store | Exception] = queue.SimpleQueue()

    def call() -> None:
        try:
            replies.put(_store(launch))
        except Exception as error:  # raised below
            replies.put(error)

    threading.Thread(target=call, name="wsm-meet", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            reply = replies.get(timeout=_LOOK)
            break
        waiting.tell([0])
    if isinstance(reply, Exception):
        raise MergeError(
            f"{launch}: no meeting at {launch.address}:{launch.port}: {_first_line(reply)}; is the "
            f"port free (MASTER_PORT), and do all ranks run? Else {launch.way_out}"
        ) from reply
    _stores[launch] = dist.PrefixStore(f"wsm/{launch.job}", reply)
    return _stores[launch]


def forget_stores() -> None:
    """Connect anew: who holds the store may have died."""
    _stores.clear()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _store(launch: Launch) -> dist.Store:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        launch.address,
        launch.port,
        launch.size,
        is_master=launch.rank == 0 and not agent,
        timeout=timedelta(seconds=timeouts.start_within),
        wait_for_workers=False,
        multi_tenant=True,  # a process may merge again
    )

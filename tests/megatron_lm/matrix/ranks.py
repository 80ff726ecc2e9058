"""Launches whose ranks are forked from a process that has imported this Megatron-LM.

``python -m tests.megatron_lm.matrix.ranks SCRIPT``, started by :class:`Ranks`: most of a short
launch is imports, and a table is hundreds of launches. The ranks run the script that
``torch.distributed.run`` would run, in the same environment. Requests come as JSON lines.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.megatron_lm.checkout import Outcome, environment, free_port


class Ranks:
    """The process that forks ranks of one checkout with one set of stand-ins."""

    def __init__(
        self,
        megatron: Path,
        standins: Sequence[str] = (),
        script: str = "pretrain_gpt.py",
        env: Mapping[str, str] | None = None,
    ):
        """``megatron``: as :func:`tests.megatron_lm.checkout.prepare` makes it."""
        more = {"RANK": "0", **(env or {})}
        if standins:
            more["STANDINS"] = ",".join(standins)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, str(megatron / script)],
            env=environment(megatron) | more,
            cwd=megatron,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(
        self, flags: str, *, plugin: bool = True, nproc: int = 2, timeout: float = 600
    ) -> Outcome:
        """Run the script on gloo ranks to its end; all are killed when one fails."""
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            request = {"flags": shlex.split(flags), "plugin": plugin, "nproc": nproc}
            request |= {"timeout": timeout, "log": log.name}
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
            if not reply:
                raise RuntimeError("the process that forks ranks has ended; see its output")
            return Outcome(json.loads(reply), log.read())

    def close(self) -> None:
        self._process.communicate()


def _serve(script: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    for line in sys.stdin:
        print(_run(script, json.loads(line)), file=replies, flush=True)


def _run(script: str, request: dict[str, Any]) -> int:
    """Exit status of the first rank that failed; 0 when all ended well, -1 when time was over."""
    port = free_port()
    ranks = [_fork(script, request, rank, port) for rank in range(request["nproc"])]
    try:
        return _wait(ranks, time.monotonic() + request["timeout"])
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # and what it has started


def _wait(ranks: list[int], deadline: float) -> int:
    running, failed = set(ranks), 0
    while running and not failed:
        if time.monotonic() > deadline:
            failed = -1
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return failed


def _fork(script: str, request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        numbers |= {"WORLD_SIZE": request["nproc"], "LOCAL_WORLD_SIZE": request["nproc"]}
        os.environ |= {name: str(n) for name, n in (numbers | {"MASTER_PORT": port}).items()}
        status = _rank(script, request)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _rank(script: str, request: dict[str, Any]) -> int:
    _fork_results_queue()
    if request["plugin"]:
        importlib.import_module("wsm_megatron.plugin.hooks").install()
    sys.argv = [script, *request["flags"]]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _fork_results_queue() -> None:
    """Megatron's checkpoint writers report through a process that would be spawned, and import
    torch and Megatron once more, at the first save."""
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    module: Any = importlib.import_module(name)
    module._results_queue = multiprocessing.get_context("fork").Manager().Queue()


if __name__ == "__main__":
    gc.disable()  # what is imported stays
    runpy.run_path(sys.argv[1], run_name="imported")
    gc.freeze()
    gc.enable()
    _serve(sys.argv[1])
    os._exit(0)

"""Rank and rendezvous of a process that ``srun`` started, from Slurm's own variables."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from wsm_megatron.errors import UsageError

PORTS = (20000, 30000)
"""Below the ports that Linux hands out by itself."""
_STEPS = 31
"""Ports apart of consecutive jobs, so that their steps do not meet on a shared node."""


@dataclass(frozen=True)
class Task:
    """One task of a job step: its rank, and where rank 0 listens."""

    rank: int
    size: int
    address: str
    port: int


def task_of_step(environ: Mapping[str, str]) -> Task | None:
    """The task that this process is; None outside a step, and in a step of one task.

    The batch script itself and an interactive shell of ``salloc`` are no tasks of several, although
    ``SLURM_NTASKS`` is set there. ``MASTER_ADDR`` and ``MASTER_PORT`` go before what is found here:
    the first node of the step, and a port reserved with ``srun --resv-ports`` or else made from the
    numbers of the job and the step.
    """
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    size = whole_number(environ, "SLURM_STEP_NUM_TASKS", 1)
    return Task(
        rank=whole_number(environ, "SLURM_PROCID", 0, size),
        size=size,
        address=environ.get("MASTER_ADDR")
        or _address(first_host(environ.get("SLURM_STEP_NODELIST", ""))),
        port=master_port(environ) if environ.get("MASTER_PORT") else _port(environ),
    )


def master_port(environ: Mapping[str, str]) -> int:
    """``MASTER_PORT``, where rank 0 listens."""
    return whole_number(environ, "MASTER_PORT", 1, 2**16)


def whole_number(
    environ: Mapping[str, str], name: str, least: int = 0, below: int | None = None
) -> int:
    """A number from the environment.

    Raises:
        UsageError: it is none, or less than ``least``, or not below ``below``.
    """
    text = environ.get(name, "")
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
    if value < least or (below is not None and value >= below):
        limit = "" if below is None else f" to {below - 1}"
        raise UsageError(f"{name}={text} in the environment is not a number from {least}{limit}")
    return value


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: ``gpu[07-09,12]-ib,login1`` -> ``gpu07-ib``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UsageError(f"cannot read the node list {nodes!r}; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _port(environ: Mapping[str, str]) -> int:
    if reserved := environ.get("SLURM_STEP_RESV_PORTS"):
        return int(re.split("[-,]", reserved)[0])
    low, high = PORTS
    job, step = (whole_number(environ, f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
    return low + (job * _STEPS + step) % (high - low)


def _address(host: str) -> str:
    """A host's name where it resolves, otherwise the address by which Slurm reaches the node."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return _node_address(host)
    return host


def _node_address(node: str) -> str:
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    if (found := re.search(r"\bNodeAddr=(\S+)", shown)) is None:
        raise UsageError(f"the node {node} has no address that resolves here; set MASTER_ADDR")
    return found[1]

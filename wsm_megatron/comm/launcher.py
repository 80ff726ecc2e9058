"""Who started this process: its rank, how many there are and where they meet, by its environment.

torchrun's variables, which job operators set too, those of ``mpirun`` (Open MPI, MPICH, Intel MPI,
MVAPICH) and those of a Slurm step. Commands that need one process only never look here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from wsm_megatron.comm.slurm import PORTS, master_port, task_of_step, whole_number
from wsm_megatron.errors import UsageError

_HERE = "127.0.0.1"
_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PBS_JOBID", "LSB_JOBID")
"""What all ranks of a job have in common, also on other hosts, and other jobs do not."""
_LOCAL = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)


class _Names(NamedTuple):
    """How an MPI tells a process who it is: its variables."""

    size: str
    rank: str
    local_size: str
    local_rank: str


_MPI = (
    _Names(*(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))),
    _Names(*(f"MV2_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))),
    _Names("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Launch:
    """One rank of several.

    Attributes:
        address: where rank 0 listens. port: and on which port.
        job: keeps jobs apart that meet at one port.
        names: of the variables that say size and rank.
    """

    rank: int
    size: int
    address: str
    port: int
    job: str
    names: tuple[str, str]

    def __str__(self) -> str:
        size, rank = self.names
        said = f"{size}={self.size} {rank}={self.rank} in the environment"
        return f"rank {self.rank} of {self.size} ({said})"

    @property
    def way_out(self) -> str:
        return f"to merge with this process alone, unset {' and '.join(self.names)}"


def launched_as(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Which rank this process is; None where it is alone.

    ``RANK`` and ``WORLD_SIZE`` go first, then ``mpirun``, which may itself run under Slurm.

    Raises:
        UsageError: the variables contradict each other, or do not say where to meet.
    """
    environ = {name: value for name, value in environ.items() if value}
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _by_name(environ)
    mpi = next((one for one in _MPI if one.size in environ and one.rank in environ), None)
    if mpi is not None:
        return _by_mpi(environ, mpi)
    if "SLURM_STEP_NUM_TASKS" in environ:
        return _by_slurm(environ)
    _refuse_half(environ)
    return None


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Of this process among those on its machine."""
    name = next((name for name in _LOCAL if environ.get(name)), None)
    return 0 if name is None else whole_number(environ, name)


def _by_name(environ: Mapping[str, str]) -> Launch | None:
    numbers = _numbers(environ, "WORLD_SIZE", "RANK")
    if numbers is None:
        return None
    job = environ.get("TORCHELASTIC_RUN_ID", "") + environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return _launch(environ, *numbers, ("WORLD_SIZE", "RANK"), job)


def _by_mpi(environ: Mapping[str, str], names: _Names) -> Launch | None:
    numbers = _numbers(environ, names.size, names.rank)
    if numbers is None:
        return None
    rank, size = numbers
    given = (names.size, names.rank)
    job = next((environ[name] for name in _JOBS if name in environ), None)
    slurm = (environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS"))
    if slurm == (str(rank), str(size)) and (task := task_of_step(environ)):  # srun --mpi=...
        return Launch(rank, size, task.address, task.port, job or "", given)
    if "MASTER_ADDR" in environ:
        port = None if job is None else _port_of(job)
        return _launch(environ, rank, size, given, job or "", port)
    if not _on_one_host(environ, names, rank, size):
        raise UsageError(
            f"{_said(environ, given)}: the ranks are on several hosts, and no MASTER_ADDR says "
            "where they meet; give all of them MASTER_ADDR, the host of rank 0, and MASTER_PORT, a "
            "free port there (mpirun -x, mpiexec -genv)"
        )
    job = job or f"session {os.getsid(0)}"
    port = master_port(environ) if "MASTER_PORT" in environ else _port_of(job)
    return Launch(rank, size, _HERE, port, job, given)


def _by_slurm(environ: Mapping[str, str]) -> Launch | None:
    task = task_of_step(environ)
    if task is None:
        return None
    job = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    return Launch(task.rank, task.size, task.address, task.port, job, names)


def _launch(
    environ: Mapping[str, str],
    rank: int,
    size: int,
    names: tuple[str, str],
    job: str,
    port: int | None = None,
) -> Launch:
    """One that meets at ``MASTER_ADDR`` and ``MASTER_PORT``, or at ``port`` there."""
    if port is None or "MASTER_PORT" in environ:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise UsageError(
                    f"{_said(environ, names)} make this one of {size} ranks, and {name} does not "
                    f"say where they meet: set it, or unset {' and '.join(names)} to merge with "
                    "this process alone"
                )
        port = master_port(environ)
    return Launch(rank, size, environ["MASTER_ADDR"], port, job, names)


def _numbers(environ: Mapping[str, str], size: str, rank: str) -> tuple[int, int] | None:
    """Rank and size; None for one rank."""
    ranks = whole_number(environ, size, 1)
    this = whole_number(environ, rank)
    if this >= ranks:
        raise UsageError(
            f"{_said(environ, (size, rank))}: ranks count from 0 to {ranks - 1}; correct them, or "
            "unset both to merge with this process alone"
        )
    return None if ranks == 1 else (this, ranks)


def _on_one_host(environ: Mapping[str, str], names: _Names, rank: int, size: int) -> bool:
    if names.local_size in environ:
        return whole_number(environ, names.local_size) == size
    return names.local_rank in environ and whole_number(environ, names.local_rank) == rank


def _refuse_half(environ: Mapping[str, str]) -> None:
    """Of several ranks, the environment says only how many they are, or only which this one is."""
    for name in ("WORLD_SIZE", "RANK", "PMIX_RANK", *(names.rank for names in _MPI)):
        if name in environ and environ.get("WORLD_SIZE") != "1":
            missing = "which this one is" if name == "WORLD_SIZE" else "how many they are"
            raise UsageError(
                f"{name}={environ[name]} in the environment speaks of several ranks, and nothing "
                f"says {missing}: set RANK and WORLD_SIZE, or unset {name} to merge with this "
                "process alone"
            )


def _said(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return " ".join(f"{name}={environ[name]}" for name in names)


def _port_of(job: str) -> int:
    low, high = PORTS
    return low + zlib.crc32(f"{os.getuid()} {job}".encode()) % (high - low)

"""Who a process is among others, by the variables of whoever started it; or one clear refusal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import runs
from tests.ports import reserved_ports
from tests.reference import RUNS
from tests.unit.comm.test_slurm import STEP
from wsm_megatron.cli.main import main
from wsm_megatron.comm.launcher import launched_as, local_rank
from wsm_megatron.errors import EXIT_USAGE

MERGE = [sys.executable, "-m", "wsm_megatron", "merge"]
MERGE += ["--load", str(RUNS / runs.DENSE), "--save"]
TORCH = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "555"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3"}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items() if "OMPI" in name}


def test_torchruns_variables() -> None:
    launch = launched_as(TORCH)
    assert launch is not None
    assert (launch.rank, launch.size) == (3, 4)
    assert (launch.address, launch.port) == ("node1", 555)
    assert str(launch) == "rank 3 of 4 (WORLD_SIZE=4 RANK=3 in the environment)"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": ""},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "LOCAL_RANK": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0", "PMI_RANK": "0"},
    ],
    ids=str,
)
def test_alone(environ: dict[str, str]) -> None:
    assert launched_as(environ) is None


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, MVAPICH], ids=["Open MPI", "PMI", "MVAPICH"])
def test_mpirun_on_one_host(environ: dict[str, str]) -> None:
    launch = launched_as(environ)
    assert launch is not None
    assert (launch.rank, launch.size, launch.address) == (3, 4, "127.0.0.1")
    again = launched_as({name: "1" if value == "3" else value for name, value in environ.items()})
    assert again is not None and (again.rank, again.port, again.job) == (1, launch.port, launch.job)
    at = launched_as({**environ, "MASTER_ADDR": "node1", "MASTER_PORT": "555"})
    assert at is not None and (at.rank, at.address, at.port) == (3, "node1", 555)
    assert local_rank(environ) == 3


def test_two_jobs_on_one_host_do_not_meet() -> None:
    other = {**OPEN_MPI, "PMIX_NAMESPACE": "prterun-node1-78@1"}
    one, two = launched_as(OPEN_MPI), launched_as(other)
    assert one is not None and two is not None
    assert one.job != two.job and one.port != two.port


def test_mpirun_on_several_hosts() -> None:
    spread = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    with pytest.raises(ValueError, match="no MASTER_ADDR says where they meet"):
        launched_as(spread)
    launch = launched_as({**spread, "MASTER_ADDR": "node1"})
    assert launch is not None and launch.address == "node1"
    del spread["OMPI_COMM_WORLD_LOCAL_SIZE"], spread["PMIX_NAMESPACE"]
    with pytest.raises(ValueError, match="no MASTER_ADDR"):
        launched_as(spread)
    with pytest.raises(ValueError, match="MASTER_PORT does not say"):
        launched_as({**spread, "MASTER_ADDR": "node1"})


def test_mpirun_under_slurm() -> None:
    """Its daemons are tasks of a step of another size, whose variables the ranks inherit."""
    nested = {**STEP, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    launch = launched_as(nested)
    assert launch is not None and (launch.rank, launch.size) == (3, 4)
    same = launched_as({**STEP, **HYDRA})  # srun --mpi=pmi2
    assert same is not None and (same.rank, same.address, same.port) == (3, "localhost", 20219)


def test_slurm_and_half_of_torchruns_variables() -> None:
    """Batch scripts export WORLD_SIZE and MASTER_ADDR; srun tells the rank."""
    launch = launched_as({**STEP, "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"})
    assert launch is not None and (launch.rank, launch.address) == (3, "10.0.0.1")


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* which this one is: .* unset WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 .* how many they are: .* unset RANK"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 .* how many they are"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 .* how many they are"),
        ({**TORCH, "WORLD_SIZE": "two"}, "WORLD_SIZE=two .* is not a number from 1"),
        ({**TORCH, "WORLD_SIZE": "0"}, "WORLD_SIZE=0 .* is not a number from 1"),
        ({**TORCH, "RANK": "-1"}, "RANK=-1 .* is not a number from 0"),
        ({**TORCH, "RANK": "4"}, "WORLD_SIZE=4 RANK=4: ranks count from 0 to 3"),
        ({**TORCH, "MASTER_ADDR": ""}, "one of 4 ranks, and MASTER_ADDR does not say .* unset"),
        ({**TORCH, "MASTER_PORT": ""}, "one of 4 ranks, and MASTER_PORT does not say .* unset"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT=http .* is not a number from 1 to 65535"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 .* is not a number from 1 to 65535"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK=x .* is not a number"),
        ({**STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 .* is not a number from 0 to 3"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        launched_as(environ)
    assert "\n" not in str(refused.value)


def test_commands_for_one_process_do_not_care(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["inspect", str(RUNS / runs.DENSE)]) == 0
    assert main(["coefficients", "--num", "3"]) == 0
    command = ["merge", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out")]
    assert main(command) == EXIT_USAGE
    assert "unset WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_says_so_and_can_be_stopped(tmp_path: Path, rank: int) -> None:
    """In a pod whose operator has set WORLD_SIZE and RANK: the other rank never comes."""
    with reserved_ports(1) as (port,):
        names = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_PORT": str(port)}
        process = subprocess.Popen(
            [*MERGE, str(tmp_path / "out")],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", **names},
            stderr=subprocess.PIPE,
            text=True,
        )
        timer = threading.Timer(300, process.kill)
        timer.start()
        assert process.stderr is not None
        told = process.stderr.readline()
        assert f"rank {rank} of 2 (WORLD_SIZE=2 RANK={rank} in the environment)" in told
        assert f"waiting for rank {1 - rank} at 127.0.0.1:{port}" in told
        assert "unset WORLD_SIZE and RANK" in told
        process.send_signal(signal.SIGTERM)
        last = process.communicate()[1]
        timer.cancel()
    assert process.returncode == 128 + signal.SIGTERM
    stopped = f"rank {rank} failed in starting: stopped by SIGTERM; nothing was published\n"
    assert last == (
        f"ERROR: {stopped}"
        if rank == 0
        else "wsm merge: stopped by SIGTERM; nothing was published\n"
    )
    assert not (tmp_path / "out").exists()


def test_processes_of_mpirun_are_ranks_of_one_job(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [*MERGE, str(tmp_path / "out")],
            env={
                **os.environ,
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                "PMIX_NAMESPACE": f"test {os.getpid()}",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "merged checkpoint" in said[0] and said[1] == ""
    assert len(list((tmp_path / "out" / "iter_0000008").glob("*.distcp"))) == 2

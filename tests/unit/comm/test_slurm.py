"""What Slurm's variables say about a task."""

from __future__ import annotations

import subprocess

import pytest

from wsm_megatron.comm import slurm
from wsm_megatron.comm.slurm import Task, first_host, task_of_step

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[07,09]-ib", "gpu07-ib"),
        ("rack[2-3]node[04-05]", "rack2node04"),
        ("login1,gpu[07-09]", "login1"),
        ("nid[001240]", "nid001240"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_task_knows_its_rank_and_where_to_meet() -> None:
    assert task_of_step(STEP) == Task(rank=3, size=4, address="localhost", port=20219)


def test_steps_and_jobs_on_one_node_meet_at_different_ports() -> None:
    variables = [
        STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(7, 17)
        for step in range(20)
    ]
    ports = {task.port for one in variables if (task := task_of_step(one))}
    assert len(ports) == 200


def test_what_is_given_goes_first() -> None:
    given = {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "555",
        "SLURM_STEP_RESV_PORTS": "12000-1",
    }
    assert task_of_step(STEP | given) == Task(rank=3, size=4, address="10.0.0.1", port=555)
    del given["MASTER_PORT"]
    assert task_of_step(STEP | given) == Task(rank=3, size=4, address="10.0.0.1", port=12000)


def test_a_batch_script_and_an_interactive_shell_are_no_tasks() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert task_of_step(batch) is None
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert task_of_step(batch | shell) is None


def test_a_node_whose_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1"
    answer = subprocess.CompletedProcess([], 0, stdout=shown)
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: answer)
    away = STEP | {"SLURM_STEP_NODELIST": "no-such-host.invalid"}
    task = task_of_step(away)
    assert task is not None and task.address == "10.1.2.3"
    answer.stdout = ""
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        task_of_step(away)

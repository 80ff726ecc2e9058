"""``scripts/merge.sbatch`` on two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY
from wsm_megatron import MergeConfig, merge

SCRIPT = str(REPOSITORY / "scripts" / "merge.sbatch")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
RUN = RUNS / runs.MOE


def options(save: Path) -> list[str]:
    return ["--load", str(RUN), "--save", str(save), "--decay=1-sqrt", "--optimizer-state=merge"]


def alone(save: Path, **more: int) -> Path:
    """The same merge in this process."""
    config = MergeConfig(load=RUN, save=save, decay="1-sqrt", optimizer_state="merge", **more)
    return merge(config).output


def assert_same(path: Path, other: Path) -> None:
    actual, expected = load_tensors(path), load_tensors(other)
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_give_the_bits_of_one_process(
    cluster: Cluster, tmp_path: Path, launcher: str
) -> None:
    job = cluster.submit(
        *(*TWO_BY_TWO, "--output", str(tmp_path / "log"), SCRIPT, *options(tmp_path / "out")),
        env={"LAUNCHER": launcher, "LOG_JSON": str(tmp_path / "events")},
    )
    done = cluster.wait(job, "COMPLETED")
    output = tmp_path / "out" / "iter_0000008"
    assert f"{output}" in cluster.output(done)
    assert len(list(output.glob("*.distcp"))) == 4, "a file of each rank"
    assert done["NodeList"] == "wsm[1-2]"
    started, *_, finished = events(tmp_path / "events" / f"{job}.jsonl")
    assert started["ranks"] == len(started["hosts"]) == 4 and started["slurm"]["job"] == job
    assert finished["event"] == "finished"
    assert [one["rank"] for one in finished["ranks"]] == [0, 1, 2, 3]
    assert sum(one["bytes_read"] for one in finished["ranks"]) == finished["bytes_read"]
    assert_same(output, alone(tmp_path / "alone"))


def test_an_array_merges_every_end_point(cluster: Cluster, tmp_path: Path) -> None:
    """The script submits itself, on the GPU partition, with two ends."""
    settings = {
        "ENDS": "6 8",
        "NODES": "1",
        "RANKS_PER_NODE": "2",
        "CPUS_PER_RANK": "1",
        "GPUS_PER_NODE": "1",
        "PARTITION": "gpu",
        "SBATCH_ARGS": f"--parsable --output {tmp_path}/log-%a",
        "LOG_JSON": str(tmp_path / "events"),
    }
    command = [SCRIPT, *options(tmp_path / "out"), "--last", "2"]
    job = cluster.call(*command, env=settings).strip()
    for k, end in enumerate((6, 8)):
        cluster.wait(f"{job}_{k}", "COMPLETED")
        expected = alone(tmp_path / "alone", last=2, to=end)
        assert_same(tmp_path / "out" / expected.name, expected)
        last = events(tmp_path / "events" / f"{job}_{k}.jsonl")[-1]
        assert last["event"] == "finished" and last["iterations"][-1] == end


def test_a_job_requeued_in_the_middle_finishes(cluster: Cluster, tmp_path: Path) -> None:
    started = tmp_path / "started"
    settings = {"WSM": "python -m tests.slurm.gated", "STARTED": str(started)}
    settings["LOG_JSON"] = str(tmp_path / "events")
    command = [*TWO_BY_TWO, "--output", str(tmp_path / "log"), SCRIPT]
    job = cluster.submit(*command, *options(tmp_path / "out"), env=settings)
    wait_for(started)
    assert not list((tmp_path / "out").glob("iter_*")), "nothing is published yet"
    cluster.call("scontrol", "requeue", job)
    cluster.start_now(job)
    done = cluster.wait(job, "COMPLETED")
    assert done["Restarts"] == "1"
    told = [event["event"] for event in events(tmp_path / "events" / f"{job}.jsonl")]
    assert told.count("started") == 2 and told[-1] == "finished"
    assert_same(tmp_path / "out" / "iter_0000008", alone(tmp_path / "alone"))


def test_shortly_before_its_time_is_over_a_job_requeues_itself(
    cluster: Cluster, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    settings = {"WSM": "python -m tests.slurm.gated", "STARTED": str(started)}
    command = [*TWO_BY_TWO, "--output", str(tmp_path / "log"), SCRIPT, *options(tmp_path / "out")]
    job = cluster.submit(*command, env=settings)
    wait_for(started)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends
    cluster.start_now(job)
    cluster.wait(job, "COMPLETED")
    assert_same(tmp_path / "out" / "iter_0000008", alone(tmp_path / "alone"))


def events(path: Path) -> list[dict[str, Any]]:
    """What a job has told."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dry_run() -> None:
    settings = {"DRY_RUN": "1", "NODES": "4", "ENDS": "10 20 30", "PARTITION": "gpu", "MEM": "0"}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    printed = subprocess.run(
        [SCRIPT, "--load", "a run", "--save", "out"],
        env=environ | settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split("merge.sbatch")[1].strip() == r"--load a\ run --save out"
    for words in ("sbatch --nodes 4", "--partition gpu", "--mem 0", "--array 0-2"):
        assert words in printed


def test_dry_run_in_a_job(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        *(*TWO_BY_TWO, "--output", str(tmp_path / "log"), SCRIPT, *options(tmp_path / "out")),
        env={"DRY_RUN": "1", "SRUN_ARGS": "--comment=x", "LAUNCHER": "torchrun"},
    )
    printed = cluster.output(cluster.wait(job, "COMPLETED"))
    assert "--comment=x torchrun --nnodes 2 --nproc-per-node 2" in printed
    assert "--rdzv-endpoint 127.0.0.1:" in printed
    assert not (tmp_path / "out").exists()


def wait_for(path: Path) -> None:
    """Until a job has made this file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)

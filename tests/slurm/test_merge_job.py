"""``scripts/merge.sbatch`` on two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_a_job_requeued_while_it_writes_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_gated(cluster, tmp_path, LOG_JSON=str(tmp_path / "events"))
    cluster.call("scontrol", "requeue", job)
    cluster.start_now(job)
    done = cluster.wait(job, "COMPLETED")
    assert done["Restarts"] == "1"
    assert "continuing it" in cluster.output(done)
    told = events(tmp_path / "events" / f"{job}.jsonl")
    assert [event["event"] for event in told].count("started") == 2
    planned = [event for event in told if event["event"] == "planned"][-1]
    assert told[-1]["event"] == "finished"
    assert told[-1]["bytes_written"] < planned["bytes_to_write"], "it started over"
    assert_same(tmp_path / "out" / "iter_0000008", alone(tmp_path / "alone"))


def test_shortly_before_its_time_is_over_a_job_requeues_itself(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit_gated(cluster, tmp_path)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends
    cluster.start_now(job)
    done = cluster.wait(job, "COMPLETED")
    assert "continuing it" in cluster.output(done)
    assert_same(tmp_path / "out" / "iter_0000008", alone(tmp_path / "alone"))


def test_a_site_that_does_not_requeue(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_gated(cluster, tmp_path)
    cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")  # what JobRequeue=0 makes of it
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    done = cluster.ended(job)
    assert done["ExitCode"] == "143:0" and done["Restarts"] == "0"
    assert "does not requeue (JobRequeue=0?): submit the same command" in cluster.output(done)
    again = cluster.submit(*arguments(tmp_path))
    assert "continuing it" in cluster.output(cluster.wait(again, "COMPLETED"))
    assert_same(tmp_path / "out" / "iter_0000008", alone(tmp_path / "alone"))


@pytest.mark.parametrize("how", [[], ["--signal=TERM"]], ids=["the job", "its ranks"])
def test_scancel_is_told_by_the_exit_status(
    cluster: Cluster, tmp_path: Path, how: list[str]
) -> None:
    job = submit_gated(cluster, tmp_path)
    cluster.call("scancel", *how, job)
    done = cluster.ended(job)
    assert done["ExitCode"] == "143:0"
    assert "stopped by SIGTERM; nothing was published" in cluster.output(done)
    assert not list((tmp_path / "out").glob("iter_*"))


def arguments(folder: Path, *settings: str) -> list[str]:
    job = [*TWO_BY_TWO, "--output", str(folder / "log"), SCRIPT, *settings]
    return [*job, *options(folder / "out")]


def submit_gated(cluster: Cluster, folder: Path, **settings: str) -> str:
    """A job whose ranks all wait in the middle of writing."""
    started = folder / "started"
    gate = {"WSM": "python -m tests.slurm.gated", "STARTED": str(started)}
    job = cluster.submit(*arguments(folder), env=gate | settings)
    for rank in range(4):
        wait_for(Path(f"{started}.{rank}"))
    journals = list((folder / "out").glob(".iter_0000008.*/*.journal"))
    assert len(journals) == 4
    assert all(len(journal.read_text().splitlines()) >= 3 for journal in journals)
    assert not list((folder / "out").glob("iter_*")), "nothing is published yet"
    return job


def events(path: Path) -> list[dict[str, Any]]:
    """What a job has told."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_site_that_exports_no_environment(cluster: Cluster, tmp_path: Path) -> None:
    """The script hands its settings on as arguments, the end points among them."""
    settings = {
        "ENDS": "6 8",
        "CPUS_PER_RANK": "1",
        "SBATCH_ARGS": f"--parsable --output {tmp_path}/log-%a",
        "SBATCH_EXPORT": "NONE",
        "LOG_JSON": str(tmp_path / "events"),
        "WSM": f"{sys.executable} {wsm_script(tmp_path)}",
    }
    command = [SCRIPT, *options(tmp_path / "out"), "--last", "2"]
    job = cluster.call(*command, env=settings).strip()
    for k, end in enumerate((6, 8)):
        cluster.wait(f"{job}_{k}", "COMPLETED")
        expected = alone(tmp_path / "alone", last=2, to=end)
        assert_same(tmp_path / "out" / expected.name, expected)
        assert events(tmp_path / "events" / f"{job}_{k}.jsonl")[-1]["event"] == "finished"


def wsm_script(folder: Path) -> Path:
    """``wsm`` of this checkout, where there is no PYTHONPATH."""
    script = folder / "wsm.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from wsm_megatron.__main__ import run\nrun()\n"
    )
    return script


@pytest.mark.parametrize(
    "array, settings, words",
    [
        (["--array=0-1"], {}, "every task would make the same merge"),
        (["--array=0-1", "--export=NONE"], {"ENDS": "6 8"}, "every task would make the same merge"),
        (["--array=2"], {"ENDS": "6 8"}, "task 2 of an array, and 2 end points"),
        ([], {"ENDS": "6 8"}, "2 end points (ENDS), and no job array"),
        ([], {"WSM": "/no/such/wsm"}, "no /no/such/wsm on"),
        ([], {"LOG_JSON": "s3://bucket/logs"}, "is an address, not a folder"),
    ],
    ids=["no ends", "ends lost", "too few ends", "no array", "no wsm", "object storage"],
)
def test_what_a_job_refuses_in_one_line(
    cluster: Cluster, tmp_path: Path, array: list[str], settings: dict[str, str], words: str
) -> None:
    job = cluster.submit(*array, *arguments(tmp_path), env=settings)
    job += f"_{array[0][-1]}" if array else ""
    done = cluster.ended(job)
    assert done["ExitCode"] == "2:0"
    (line,) = set(cluster.output(done).splitlines())
    assert line.startswith("merge.sbatch: ") and words in line
    assert not (tmp_path / "out").exists()


def test_one_end_point_needs_no_array(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(*arguments(tmp_path, "ENDS=6"), "--last", "2")
    cluster.wait(job, "COMPLETED")
    assert [path.name for path in (tmp_path / "out").glob("iter_*")] == ["iter_0000006"]


def test_more_cores_than_a_node_has(cluster: Cluster, tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, *options(tmp_path / "out")],
        env=cluster.environ | {"CPUS_PER_RANK": "3", "RANKS_PER_NODE": "2"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "merge.sbatch: 6 cores on a node are wanted (RANKS_PER_NODE x CPUS_PER_RANK), and the "
        "largest has 4: give less, for instance CPUS_PER_RANK=2\n"
    )


def test_dry_run() -> None:
    settings = {"DRY_RUN": "1", "NODES": "4", "ENDS": "10 20 30", "PARTITION": "gpu", "MEM": "0"}
    settings["WSM"] = "wsm"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    printed = subprocess.run(
        [SCRIPT, "--load", "a run", "--save", "out"],
        env=environ | settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    handed_on = r"ENDS=10\ 20\ 30 WSM=wsm --load a\ run --save out"
    assert printed.split("merge.sbatch")[1].strip() == handed_on
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

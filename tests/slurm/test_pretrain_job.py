"""``scripts/pretrain_wsm.sbatch`` on two nodes: training, kept shards, a merged checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.reference import load_tensors, same_bits
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY
from tests.slurm.test_merge_job import wait_for
from wsm_megatron import MergeConfig, merge

SCRIPT = str(REPOSITORY / "scripts" / "pretrain_wsm.sbatch")
TRAINING = str(REPOSITORY / "tests" / "slurm" / "training.py")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
SETTINGS = {"SCRIPT": TRAINING, "LAUNCH": "", "GPUS_PER_NODE": "0", "TORCHDYNAMO_DISABLE": "1"}


def submit(cluster: Cluster, root: Path, **settings: str) -> str:
    return cluster.submit(
        *(*TWO_NODES, "--output", str(root / "log"), SCRIPT, str(root)), env=SETTINGS | settings
    )


def assert_merged(root: Path) -> None:
    """The checkpoint that the job emitted is the offline merge of the run's own checkpoints."""
    config = MergeConfig(
        load=root / "run", save=root / "offline", last=3, decay="1-sqrt", optimizer_state="last"
    )
    expected = load_tensors(merge(config).output)
    actual = load_tensors(root / "merged" / "iter_0000008")
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


def test_a_training_job_cancelled_and_requeued_emits_its_merge(
    cluster: Cluster, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    job = submit(cluster, tmp_path, STARTED=str(started), LAUNCHER="srun")
    wait_for(started)
    cluster.call("scontrol", "requeue", job)
    cluster.start_now(job)
    done = cluster.wait(job, "COMPLETED")
    assert done["Restarts"] == "1"
    output = cluster.output(done)
    assert "starting at iteration 0" in output and "starting at iteration 4" in output
    assert "merged [4, 6, 8]" in output
    assert_merged(tmp_path)


def test_a_training_job_under_torchrun(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.wait(submit(cluster, tmp_path, LAUNCHER="torchrun"), "COMPLETED")
    assert done["NodeList"] == "wsm[1-2]"
    assert "merged [4, 6, 8]" in cluster.output(done)
    assert_merged(tmp_path)


def test_dry_run() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    settings = {"SCRIPT": "pretrain_gpt.py", "NODES": "16", "DRY_RUN": "1"}
    printed = subprocess.run(
        [SCRIPT, "--wsm-merge-num", "8"],
        env=environ | settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sbatch --nodes 16 --ntasks-per-node 8 --cpus-per-task 8 --gpus-per-node 8" in printed
    handed_on = printed.split("pretrain_wsm.sbatch ")[1].split()
    assert handed_on[0] == "SCRIPT=pretrain_gpt.py" and handed_on[-2:] == ["--wsm-merge-num", "8"]


def test_dry_run_in_a_job(cluster: Cluster, tmp_path: Path) -> None:
    settings = {"DRY_RUN": "1", "LAUNCH": "-m wsm_megatron.launch", "SCRIPT": "pretrain_gpt.py"}
    printed = cluster.output(cluster.wait(submit(cluster, tmp_path, **settings), "COMPLETED"))
    assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 1" in printed
    assert f"-m wsm_megatron.launch pretrain_gpt.py {tmp_path}" in printed

"""A training script for Slurm jobs: ``pretrain_gpt.py``'s place taken by a small megatron-core GPT.

    python tests/slurm/training.py ROOT

Trains 8 iterations, saves and takes a snapshot on disk every 2, goes on from the newest checkpoint
when it is started again, and saves the merge of the last three under ROOT/merged. With STARTED set,
a job's first start waits after iteration 4, having said so by that file, until it is ended.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from examples.cpu_ranks import GPTConfig, cuda_standin

STEPS, INTERVAL = 8, 2


def train(root: Path) -> None:
    import torch.distributed as dist

    from examples.cpu_ranks.checkpoint import TRACKER, load_checkpoint, save_checkpoint
    from examples.cpu_ranks.training import build
    from examples.cpu_ranks.training import train as train_steps
    from wsm_megatron import WSM, WSMConfig

    dist.init_process_group("gloo")
    training = build(GPTConfig(sharding_type="fully_reshardable"))
    config = WSMConfig(num=3, decay="1-sqrt", store="disk")
    wsm = WSM(training.model, training.optimizer, config, root / "kept")

    def tokens() -> int:
        return training.consumed_samples * training.config.seq_length

    if (root / "run" / TRACKER).exists():
        load_checkpoint(training, root / "run")
        wsm.refill(training.iteration, tokens())
    print(f"starting at iteration {training.iteration}", flush=True)
    while training.iteration < STEPS:
        train_steps(training, INTERVAL)
        wsm.snapshot(training.iteration, tokens())
        save_checkpoint(training, root / "run")
        if training.iteration == 4 and "STARTED" in os.environ:
            wsm.settle()
            _wait_on_first_start(Path(os.environ["STARTED"]))
    with wsm.merged() as merge:
        save_checkpoint(training, root / "merged")
    print(f"merged {list(merge.iterations)}", flush=True)
    wsm.close()
    dist.destroy_process_group()


def _wait_on_first_start(started: Path) -> None:
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        started.touch()
    while int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        time.sleep(0.1)


# Also in the processes that a checkpoint writer spawns, which import this module as __mp_main__.
if __name__ in ("__main__", "__mp_main__"):
    cuda_standin.install()

if __name__ == "__main__":
    train(Path(sys.argv[1]))

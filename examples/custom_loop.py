"""A training loop of one's own on megatron-core, with the merge in it; runs on two CPU ranks.

    python -m examples.custom_loop [FOLDER]

The four lines that matter are marked with WSM. Everything else is what a loop has anyway; on GPUs
it would be one's own, with NCCL. Expected output, in 30 s on two cores (loss in nats a token, on
sequences that count upwards and stumble now and then):

    iteration  80: trained 1.4583, merged 1.4418 of [20, 40, 60, 80]
    iteration 160: trained 1.4270, merged 1.4214 of [100, 120, 140, 160]
    merged checkpoint: FOLDER/merged/iter_0000160
    the run's own weights are back, bit for bit: True
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from examples.cpu_ranks import GPTConfig, run_ranks


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="custom_loop-"))
    config = GPTConfig(lr=1e-2, vocab_size=32)
    run_ranks(train_and_merge, 2, root / "logs", config=config, root=root, echo=True)


def counting(config: GPTConfig, first_sample: int, count: int) -> torch.Tensor:
    """Tokens of shape (count, seq_length + 1): each is the one before plus 1, or (1 in 4) any."""
    generator = torch.Generator().manual_seed(first_sample)
    shape = (count, config.seq_length + 1)
    steps = torch.ones(shape, dtype=torch.int64)
    stumbles = torch.rand(shape, generator=generator) < 0.25
    steps[stumbles] = torch.randint(config.vocab_size, shape, generator=generator)[stumbles]
    return steps.cumsum(1) % config.vocab_size


def train_and_merge(config: GPTConfig, root: Path) -> None:
    """What each rank does."""
    import torch.distributed as dist

    from examples.cpu_ranks.checkpoint import save_checkpoint
    from examples.cpu_ranks.training import build, evaluate, train
    from wsm_megatron import WSM, WSMConfig

    training = build(config)
    data = partial(counting, config)
    wsm = WSM(training.model, training.optimizer, WSMConfig(num=4, decay="1-sqrt"))  # WSM

    for _ in range(8):
        train(training, steps=20, data=data)
        wsm.snapshot(training.iteration, training.consumed_samples * config.seq_length)  # WSM
        if training.iteration % 80:
            continue
        trained = evaluate(training, data, batches=8, first_sample=1_000_000)
        with wsm.merged() as merge:  # WSM
            merged = evaluate(training, data, batches=8, first_sample=1_000_000)
        if dist.get_rank() == 0:
            print(
                f"iteration {training.iteration:3d}: trained {trained:.4f}, merged {merged:.4f} "
                f"of {list(merge.iterations)}"
            )

    before = evaluate(training, data, batches=1)
    with wsm.merged():  # WSM
        folder = save_checkpoint(training, root / "merged")
    restored = evaluate(training, data, batches=1) == before
    wsm.close()
    if dist.get_rank() == 0:
        print(f"merged checkpoint: {folder}")
        print(f"the run's own weights are back, bit for bit: {restored}")


if __name__ == "__main__":
    from examples import custom_loop  # under its own name, by which the ranks import it

    custom_loop.main()

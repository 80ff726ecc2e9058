"""What the demo's two megatron-core ranks do; megatron-core is imported there only."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from examples.cpu_ranks import GPTConfig
from examples.demo.corpus import Windows, load_corpus

if TYPE_CHECKING:
    from examples.cpu_ranks.training import Training

CONFIG = GPTConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=344,
    num_attention_heads=4,
    vocab_size=256,
    seq_length=128,
    micro_batch_size=8,
    global_batch_size=16,
    lr=2e-3,
    lr_warmup_steps=20,
)
"""0.86 M parameters on bytes; data parallel over all ranks, with the distributed optimizer."""

_EVALUATION_BATCHES = 8


def train_and_save(root: Path, steps: int, save_interval: int) -> None:
    """Train at a LR that is constant from the first save on; a full checkpoint, optimizer state
    included, every save_interval."""
    from examples.cpu_ranks.checkpoint import save_checkpoint
    from examples.cpu_ranks.training import build, train

    text, _ = load_corpus()
    training = build(replace(CONFIG, lr_warmup_steps=min(CONFIG.lr_warmup_steps, save_interval)))
    started = time.monotonic()
    if dist.get_rank() == 0:
        print(f"training on {len(text) / 1e6:.1f} MB of text", flush=True)

    def save(training: Training) -> None:
        if training.iteration % save_interval:
            return
        save_checkpoint(training, root)
        if dist.get_rank() == 0:
            loss = sum(training.losses[-save_interval:]) / save_interval
            spent = time.monotonic() - started
            left = spent * (steps / training.iteration - 1)
            print(
                f"step {training.iteration:5d} of {steps}   training loss {loss:.3f}   saved"
                f"   {spent:4.0f} s, about {left:.0f} s left",
                flush=True,
            )

    train(training, steps, Windows(text, CONFIG.seq_length, seed=1), on_step=save)


def held_out_losses(checkpoints: list[tuple[Path, int]]) -> list[float]:
    """Nats a byte of every (root, iteration), on the same held-out text; all ranks get them."""
    from examples.cpu_ranks.checkpoint import load_checkpoint
    from examples.cpu_ranks.training import build, evaluate

    _, text = load_corpus()
    data = Windows(text, CONFIG.seq_length, seed=2)
    training = build(CONFIG)
    losses = []
    for number, (root, iteration) in enumerate(checkpoints, start=1):
        load_checkpoint(training, root, iteration, load_optim=False, load_rng=False)
        loss = evaluate(training, data, _EVALUATION_BATCHES)
        assert loss is not None, "no pipeline stages here"
        losses.append(loss)
        if dist.get_rank() == 0 and number % 10 == 0:
            print(f"evaluated {number} of {len(checkpoints)} checkpoints", flush=True)
    return losses

"""Training on from a checkpoint, in the demo's ranks; megatron-core is imported there only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo.corpus import Windows, load_corpus
from examples.demo.ranks import CONFIG

if TYPE_CHECKING:
    from examples.cpu_ranks.training import Training

_EVALUATED_AFTER = (0, 1, 2, 5, 10, 20, 50, 100, 200)
_EVALUATION_BATCHES = 24


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One way to go on: a checkpoint root, and whether its optimizer state is loaded."""

    name: str
    root: Path
    load_optim: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses in nats a byte: of every training step, and held out after some of them."""

    training: list[float]
    held_out: dict[int, float]


def continue_from(branches: list[Branch], steps: int) -> list[Curve]:
    """Train on from every branch, on the same data; all ranks get the curves."""
    return [_continue(branch, steps) for branch in branches]


def _continue(branch: Branch, steps: int) -> Curve:
    import torch.distributed as dist

    from examples.cpu_ranks.checkpoint import load_checkpoint
    from examples.cpu_ranks.training import build, evaluate, train

    text, held_out = (
        Windows(part, CONFIG.seq_length, seed) for seed, part in enumerate(load_corpus(), start=1)
    )
    # Without the optimizer the LR scheduler starts anew: --lr-warmup-iters 0.
    training = build(CONFIG if branch.load_optim else replace(CONFIG, lr_warmup_steps=0))
    load_checkpoint(training, branch.root, load_optim=branch.load_optim, load_rng=branch.load_optim)
    losses = {0: _held_out(evaluate(training, held_out, _EVALUATION_BATCHES))}
    start = training.iteration

    def look(training: Training) -> None:
        done = training.iteration - start
        if done in _EVALUATED_AFTER:
            losses[done] = _held_out(evaluate(training, held_out, _EVALUATION_BATCHES))
            for chunk in training.model:
                chunk.train()

    train(training, steps, text, on_step=look)
    if dist.get_rank() == 0:
        print(f"{branch.name}: {losses}", flush=True)
    return Curve(training=training.losses, held_out=losses)


def _held_out(loss: float | None) -> float:
    assert loss is not None, "no pipeline stages here"
    return loss

"""Arms that go on from a checkpoint of a run, or from a merge of its checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.cpu_ranks import GPTConfig
from examples.cpu_ranks.checkpoint import load_checkpoint, save_checkpoint
from examples.cpu_ranks.training import Training, train
from examples.wsm_vs_wsd.bench import SPLITS, Bench, weights_of
from examples.wsm_vs_wsd.names import MEGATRON_STYLES
from examples.wsm_vs_wsd.plan import Arm
from examples.wsm_vs_wsd.points import Points
from examples.wsm_vs_wsd.queue import Queue
from examples.wsm_vs_wsd.text import training_data
from wsm_megatron import MergeConfig, merge

_SPIKE_FACTOR, _SPIKE_STEPS = 30.0, 5
"""The LR is so many times itself for so many steps."""
_TUNE_LR = 1e-3


def branch(
    bench: Bench,
    queue: Queue,
    arm: Arm,
    *,
    name: str,
    run: str,
    start: int,
    steps: int,
    lr: float,
    style: str | None = None,
    merged: str | None = None,
    experts: bool = False,
    spike: bool = False,
    save: bool = False,
    looks: list[int] | None = None,
    merges: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train ``steps`` on from step ``start``, on clean text, in the order in which the seed has it.

    style: of a decay to 0; None: the LR stays. merged: start from the mean of the checkpoints of
    the middle window before, with this ``--optimizer-state``. spike: begin with a burst of a huge
    LR. save: a checkpoint at the end. looks: after which steps to evaluate. merges: decays of
    merges of the whole branch.
    """
    profile, folder = bench.profile, queue.state(arm.name)
    shutil.rmtree(folder, ignore_errors=True)
    config = _scheduled(profile.config(arm.seed, lr, experts), style, start, steps)
    training = _begin(bench, config, queue.state(run), start, folder / "merged", merged)
    same_bits = _same_bits(bench, queue, run, start, training) if merged else None
    points = Points(steps=[start], weights=[weights_of(training)])
    rows = []

    def look(training: Training) -> None:
        done = training.iteration - start
        if spike:
            _set_lr(training, lr * (_SPIKE_FACTOR if done < _SPIKE_STEPS else 1.0))
        if done and training.iteration % profile.interval == 0:
            points.steps.append(training.iteration)
            points.weights.append(weights_of(training))
        if done in (looks or [steps]):
            label = f"{name} after {done}" if looks else name
            rows.append({"name": label, **bench.losses(training)})

    look(training)
    train(training, steps, training_data("clean", profile.seq_length, arm.seed), on_step=look)
    losses, last_lr = training.losses[:: profile.interval], training.optimizer.param_groups[0]["lr"]
    if save:
        save_checkpoint(training, folder)
    points.save(folder / "points.pt")
    for decay in merges:
        weights = points.merged(decay, steps, profile.interval, start + steps)
        rows.append({"name": f"{name}, merge {decay}", **bench.losses_of(config, weights)})
    found = {"same_bits": same_bits, "last_lr": last_lr, "training_losses": losses}
    return {"rows": rows, **found}


def _begin(
    bench: Bench, config: GPTConfig, run: Path, start: int, save: Path, merged: str | None
) -> Training:
    """At a checkpoint of the run, or at the merge of those before it, written to ``save``."""
    if merged == "drop":  # no state: that of an arm before must not be left, and no second warm-up
        training = bench.fresh(replace(config, lr_warmup_steps=0))
    else:
        training = bench.used(config)
    root = run if merged is None else merged_root(bench, run, save, start, merged)
    has_state = merged != "drop"
    load_checkpoint(training, root, start, load_optim=has_state, load_rng=has_state)
    return training


def _scheduled(config: GPTConfig, style: str | None, start: int, steps: int) -> GPTConfig:
    if style is None:
        return config
    return replace(
        config,
        lr_wsd_decay_style=MEGATRON_STYLES.get(style, style),
        lr_wsd_decay_steps=steps,
        lr_decay_steps=start + steps,
    )


def _set_lr(training: Training, lr: float) -> None:
    """From the next step on."""
    for group in training.optimizer.param_groups:
        group["lr"] = group["max_lr"] = lr


def merged_root(bench: Bench, run: Path, save: Path, end: int, policy: str) -> Path:
    """The mean of the checkpoints of the middle window up to ``end``, by the product itself."""
    profile = bench.profile
    merge(
        MergeConfig(
            load=run,
            save=save,
            to=end,
            window_iterations=(profile.middle,),
            every=profile.save_every,
            decay="mean",
            optimizer_state=policy,
        )
    )
    return save


def _same_bits(bench: Bench, queue: Queue, run: str, end: int, training: Training) -> bool:
    """Whether what was loaded is what a merge in memory gives. Where the optimizer state was
    dropped, the product merges the model's tensors, and Megatron makes main params of them."""
    profile = bench.profile
    points = Points.load(queue.state(run) / "points.pt")
    dropped = training.config.lr_warmup_steps == 0
    if dropped:
        points.weights = [one.bfloat16() for one in points.weights]
    expected = points.merged("mean", profile.middle, profile.save_every, end)
    return torch.equal(weights_of(training), expected.float())


def tune(
    bench: Bench, queue: Queue, arm: Arm, *, start: str, run: str, merged: bool
) -> dict[str, Any]:
    """Fine-tune on prose (``--finetune``): weights only, a schedule and a decay of its own."""
    profile, folder = bench.profile, queue.state(arm.name)
    shutil.rmtree(folder, ignore_errors=True)
    config = replace(profile.config(arm.seed, _TUNE_LR), lr_warmup_steps=profile.more // 10)
    steps = profile.more - config.lr_warmup_steps
    config = replace(_scheduled(config, "linear", 0, profile.more), lr_wsd_decay_steps=steps)
    training = bench.fresh(config)
    root = queue.state(run)
    if merged:
        root = merged_root(bench, root, folder / "merged", profile.steps, "drop")
    load_checkpoint(training, root, profile.steps, load_optim=False, load_rng=False)
    training.iteration = 0
    splits = (*SPLITS, "prose-test")
    rows = [{"name": f"tune: {start} before", **bench.losses(training, splits)}]
    train(training, profile.more, training_data("prose", profile.seq_length, arm.seed))
    rows.append({"name": f"tune: {start}", **bench.losses(training, splits)})
    return {"rows": rows}

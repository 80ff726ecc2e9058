"""Megatron-LM launch flags for a merged checkpoint: what to pass, and what then happens. Pure.

The merge prints them, its provenance keeps them, ``wsm resume-check`` repeats them, and the tests
launch with them. Read in ``load_checkpoint`` (training/checkpointing.py), in
``OptimizerParamScheduler`` and in ``_filter_and_reorder_param_groups`` of core_v0.16.1 and of main
(August 2026). Flags are spelled as every version from core 0.14 on knows them: 0.14 has no
``--override-opt-param-scheduler``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wsm_megatron.checkpoint.common_state import attributes, integer_in, summarize
from wsm_megatron.checkpoint.formats import TORCH_DIST_016, CheckpointFormat
from wsm_megatron.config import MergeConfig

CONTINUE = "continue"
DECAY = "decay"
FINETUNE = "finetune"
EVALUATE = "evaluate"
GOALS = {
    CONTINUE: "continue pre-training",
    DECAY: "decay the LR from here (WSD)",
    FINETUNE: "fine-tune (SFT)",
    EVALUATE: "evaluate only",
}

WEIGHTS_ONLY = ("--no-load-optim", "--no-load-rng")
"""Without the first, Megatron asks for the optimizer state and stops with ``KeyError:
'optimizer'``, although the checkpoint's args say ``no_save_optim``."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a checkpoint stands, for flags that count from there.

    Attributes:
        unit: ``iters`` or ``samples``, as the run counts (``--train-iters``, ``--train-samples``).
        trained: what the training loop has counted.
        scheduled: what the stored LR scheduler has counted; its own clock is in samples.
    """

    unit: str
    trained: int
    scheduled: int


@dataclass(frozen=True)
class Launch:
    """How to launch Megatron for one goal.

    Attributes:
        goal: a key of :data:`GOALS`.
        flags: to add to the run's own launch line beside ``--load``, in place of flags of the
            same name.
        effect: what happens to LR, data position and moments.
    """

    goal: str
    flags: tuple[str, ...]
    effect: str


def launches(
    *, optimizer: bool, position: Position, decay_steps: int | None = None
) -> tuple[Launch, ...]:
    """Launches for every goal.

    Args:
        optimizer: the checkpoint holds optimizer state and LR scheduler.
        decay_steps: iterations (samples with ``position.by_samples``) of the later decay; None
            leaves placeholders D and N+D in the flags.
    """
    make = _with_optimizer if optimizer else _weights_only
    return tuple(Launch(*goal) for goal in make(position, decay_steps))


def as_data(found: tuple[Launch, ...]) -> dict[str, Any]:
    """Plain JSON types, for provenance and ``--json``."""
    return {one.goal: {"flags": " ".join(one.flags), "effect": one.effect} for one in found}


Goal = tuple[str, tuple[str, ...], str]


def _with_optimizer(position: Position, steps: int | None) -> Iterator[Goal]:
    yield (
        CONTINUE,
        (),
        "LR, scheduler, data position and RNG go on where the newest source stood; moments as "
        "merged. A changed --train-iters needs --override-opt_param-scheduler",
    )
    yield (
        DECAY,
        ("--override-opt_param-scheduler", *_decay(position, position.scheduled, steps)),
        "LR falls from --lr to --min-lr, both as the run had them (0.16 ignores new values, main "
        "refuses them with a KeyError or ValueError); data position and moments go on",
    )
    yield FINETUNE, ("--finetune",), _FINETUNE_EFFECT
    yield EVALUATE, ("--skip-train",), _EVALUATE_EFFECT


def _weights_only(position: Position, steps: int | None) -> Iterator[Goal]:
    no_warmup = (f"--lr-warmup-{position.unit}", "0")
    yield (
        CONTINUE,
        (*WEIGHTS_ONLY, *no_warmup),
        "iteration and data position go on; the LR scheduler starts at step 0, so without "
        f"{no_warmup[0]} 0 it warms up again; moments start at zero, main params from the weights",
    )
    yield (
        DECAY,
        (*WEIGHTS_ONLY, *no_warmup, *_decay(position, 0, steps)),
        "iteration and data position go on; the LR scheduler starts at step 0 and so counts the "
        "decay alone, from --lr to --min-lr; moments start at zero",
    )
    yield FINETUNE, ("--finetune",), _FINETUNE_EFFECT
    yield EVALUATE, ("--skip-train",), _EVALUATE_EFFECT


_FINETUNE_EFFECT = (
    "weights only: iteration, data position, moments and LR scheduler start at zero, with the "
    "launch's own warm-up"
)
_EVALUATE_EFFECT = "weights only (--skip-train implies --no-load-optim); nothing is trained"


def _decay(position: Position, scheduled: int, steps: int | None) -> tuple[str, ...]:
    """WSD that anneals over ``steps`` from the next one on, counted from ``scheduled``."""
    unit = position.unit
    return (
        *("--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt"),
        *(f"--lr-wsd-decay-{unit}", _plus(0, steps)),
        *(f"--lr-decay-{unit}", _plus(scheduled, steps)),
        *(f"--train-{unit}", _plus(position.trained, steps)),
    )


def describe_resume(
    state: Mapping[str, Any], config: MergeConfig, form: CheckpointFormat = TORCH_DIST_016
) -> dict[str, Any]:
    """What a merge does with the optimizer state, and how to launch Megatron from it.

    Args:
        state: the common state before optimizer and scheduler are dropped, with the merge's
            iteration.
        form: the format of the merge.
    """
    mains = "rebuilt from the merged model" if config.rebuild_main_params else "merged"
    moments = {"drop": "dropped", "last": "of the newest source", "merge": "merged"}
    kept = config.keeps_optimizer
    loads = kept or form.loads_weights_alone
    launch = launches(optimizer=kept, position=position_of(state)) if loads else ()
    return {
        "main_params": mains if kept or form.model_is_main else "dropped",
        "moments": moments[config.optimizer_state],
        "launch": as_data(launch),
    }


def position_of(state: Mapping[str, Any]) -> Position:
    """Position of the checkpoint with this common state (:func:`.common.load_common`)."""
    args, scheduler = attributes(state.get("args")), state.get("opt_param_scheduler") or {}
    summary = summarize(state)
    iteration, samples = summary.iteration or 0, summary.consumed_samples or 0
    steps = integer_in(scheduler, "num_steps") or 0
    if integer_in(args, "train_samples"):
        return Position(unit="samples", trained=samples, scheduled=steps)
    batch = integer_in(args, "global_batch_size") or 1
    return Position(unit="iters", trained=iteration, scheduled=-(-steps // batch))


def _plus(base: int, steps: int | None) -> str:
    if steps is not None:
        return str(base + steps)
    return f"{base}+D" if base else "D"

"""``wsm resume-check``: whether and how Megatron resumes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.figures import known_tokens
from wsm_megatron.cli.launches import launch_lines
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME
from wsm_megatron.inspection.megatron_resume import ResumeReport, check_resume
from wsm_megatron.options import local_path, typed
from wsm_megatron.planning.launch_flags import as_data


def add_resume_check(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "resume-check", _resume_check, help)
    command.add_argument(
        "directory", type=typed(local_path), help="a checkpoint, or a root with a tracker"
    )
    command.add_argument(
        "--against",
        type=typed(local_path),
        help="a run or checkpoint whose launch line is to resume from it",
    )


def _resume_check(arguments: argparse.Namespace) -> Answer:
    found = check_resume(arguments.directory, arguments.against)
    status = 0 if found.resumes else EXIT_DOES_NOT_RESUME
    return Answer(_resume(found), lambda: _resume_data(found), status)


def _resume(found: ResumeReport) -> Iterator[str]:
    kind = "merged checkpoint" if found.merged else "checkpoint"
    yield f"{found.path}: {kind}, iteration {found.iteration}, tokens {known_tokens(found.tokens)}"
    sizes = ", ".join(f"{name}{size}" for name, size in found.sizes.items()) or "unknown"
    yield f"  saved with           {sizes}; common state in {found.container}"
    yield f"  read by              {found.readers}"
    yield f"  optimizer state      {_optimizer(found)}"
    yield f"  LR scheduler         {_scheduler(found.scheduler)}"
    yield f"  RNG states           {found.rng or 'none'}"
    for note in found.notes:
        yield f"  note: {note}"
    for problem in found.problems:
        yield f"  PROBLEM: {problem}"
    yield "plain --load resumes" if found.resumes else "plain --load does not resume"
    yield from launch_lines(as_data(found.launches), str(found.path.parent))


def _resume_data(found: ResumeReport) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "resumes": found.resumes,
        "iteration": found.iteration,
        "tokens": found.tokens,
        "merged": found.merged,
        "optimizer": found.optimizer,
        "any_sizes": found.any_sizes,
        "sizes": found.sizes,
        "readers": found.readers,
        "wrong_mains": list(found.mains.wrong),
        "problems": list(found.problems),
        "notes": list(found.notes),
        "launches": as_data(found.launches),
    }


def _optimizer(found: ResumeReport) -> str:
    if found.optimizer is None:
        return "none"
    sizes = "any TP and PP" if found.any_sizes else "the same TP, PP and EP"
    how_many = f"{found.mains.keyed} main params" if found.mains.keyed else "main params"
    if found.mains.buckets:
        how_many = f"main params in {found.mains.buckets} flat buckets"
    state = "NOT those of the model" if found.mains.wrong else "consistent with the model"
    if not found.mains.wrong and found.mains.near:
        state = "near the quantised model" if found.mains.bounded else "not comparable with it"
    if not found.mains.wrong and found.mains.remainders:
        state = "of which the model holds the high bits"
    mains = "the model is the main param" if found.mains.model else f"{how_many}, {state}"
    return f"{found.optimizer} ({sizes}): {mains}; {found.moments} moments"


def _scheduler(scheduler: dict[str, Any] | None) -> str:
    if scheduler is None:
        return "none"
    wanted = ("lr_decay_style", "max_lr", "min_lr", "num_steps", "lr_decay_steps")
    return ", ".join(f"{key} {scheduler[key]}" for key in wanted if key in scheduler)

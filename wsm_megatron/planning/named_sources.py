"""Sources that were named by their paths: of several runs, of a run that went on elsewhere,
``release/``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from wsm_megatron.checkpoint.common_state import CommonSummary, read_summary
from wsm_megatron.checkpoint.foreign_formats import kind_of
from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.run_directory import (
    RELEASE,
    TRACKER_FILE,
    checkpoint_path,
    named_iteration,
    read_tracker,
    tracked_iteration,
    why_untracked,
)
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.named_source import NamedSource
from wsm_megatron.planning.learning_rate import lr_problem
from wsm_megatron.planning.selection import branch_problem
from wsm_megatron.schedule.window import (
    Checkpoint,
    Consumed,
    check_number,
    count_tokens,
    why_iterations,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedSources:
    """Named sources as checkpoints, oldest first.

    Attributes:
        weights: of the checkpoints, in their order; None where a decay weighs them.
    """

    checkpoints: tuple[Checkpoint, ...]
    weights: tuple[float, ...] | None

    def weigh(self, config: MergeConfig) -> MergeConfig:
        """A merge of them, as if they lay in one run: what is recorded of it."""
        newest = self.checkpoints[-1].path
        assert newest is not None
        return replace(config, load=newest.parent, source=(), weights=self.weights)


def place_sources(
    named: Sequence[NamedSource], allow_lr_decay: bool = False, min_checkpoints: int | None = None
) -> PlacedSources:
    """Find sources, and put them in order: by iteration, those of one iteration as they were named.

    The last of them is the newest: what is not merged is copied from it.

    Raises:
        UsageError: fewer than two, or fewer than ``min_checkpoints``; a path that is no checkpoint,
            or one twice; checkpoints that do not belong together. MergeError: one is damaged.
    """
    found = [(one, path := source_path(one.path), read_summary(path)) for one in named]
    iterations = [_iteration(path, said) for _, path, said in found]
    order = sorted(range(len(found)), key=lambda j: iterations[j])
    paths = [found[j][1] for j in order]
    _check_different(paths)
    summaries = [found[j][2] for j in order]
    placed = _placed(paths, [iterations[j] for j in order], summaries)
    check_number(placed, min_checkpoints)
    if len(placed) < 2:
        raise UsageError(f"a merge needs at least two checkpoints, and --source names {paths[0]}")
    _check_rates(placed, summaries, allow_lr_decay)
    weights = tuple(found[j][0].weight for j in order)
    known = tuple(weight for weight in weights if weight is not None)
    return PlacedSources(placed, known or None)


def source_path(path: Path) -> Path:
    """The checkpoint's folder that a path names: itself, or the one of a root's tracker.

    Raises ``UsageError`` where there is none.
    """
    if not path.is_dir():
        raise UsageError(f"--source {path}: no such directory")
    if is_complete(path):
        return path
    tracker = read_tracker(path)
    if tracker is None:
        kind = kind_of(path)
        raise UsageError(
            f"--source {path} is no checkpoint, and no root with a {TRACKER_FILE}: {kind.what}; "
            "name the folder of a checkpoint"
        )
    if tracker == RELEASE:
        tracked = path / RELEASE
    elif (iteration := tracked_iteration(tracker)) is not None:
        tracked = checkpoint_path(path, iteration)
    else:
        raise UsageError(f"--source {path}: {TRACKER_FILE} {why_untracked(tracker)}")
    if not tracked.is_dir() or not is_complete(tracked):
        raise UsageError(
            f"--source {path}: {TRACKER_FILE} says {tracker}, and {tracked} is no finished "
            "checkpoint; name the folder of one"
        )
    return tracked


def _iteration(path: Path, said: CommonSummary) -> int:
    """That of its state, which its name may repeat and not contradict."""
    name = named_iteration(path)
    if said.iteration is None:
        if name is None and path.name != RELEASE:
            raise UsageError(f"--source {path}: neither its name nor its state says an iteration")
        return name or 0
    if name is not None and name != said.iteration:
        raise UsageError(
            f"--source {path} holds the state of iteration {said.iteration}: it was renamed or "
            "copied; give it a name that says no other iteration, or leave it out"
        )
    return said.iteration


def _check_different(paths: Sequence[Path]) -> None:
    known: dict[Path, Path] = {}
    for path in paths:
        other = known.setdefault(path.resolve(), path)
        if other is not path:
            raise UsageError(f"--source {other} and --source {path} are one checkpoint")


def _placed(
    paths: Sequence[Path], iterations: Sequence[int], summaries: Sequence[CommonSummary]
) -> tuple[Checkpoint, ...]:
    """Checkpoints with tokens, where they can be counted from one to the next."""
    consumed = [
        Consumed(i, said.consumed_samples, said.seq_length, said.began)
        for i, said in zip(iterations, summaries, strict=True)
    ]
    placed = tuple(
        replace(c, path=path, lr=None if said.learning_rate is None else said.learning_rate.value)
        for c, path, said in zip(count_tokens(consumed), paths, summaries, strict=True)
    )
    if len(placed) > 1 and (reason := why_iterations(placed)):
        logger.warning("sources: positions are iterations, not tokens: %s", reason)
    for (older, before), (newer, after) in pairwise(zip(placed, summaries, strict=True)):
        assert older.path is not None and newer.path is not None
        if older.path.parent != newer.path.parent or older.iteration == newer.iteration:
            continue  # of two runs, one may well be the younger
        if reason := branch_problem(older.iteration, before, newer.iteration, after):
            logger.warning("%s: %s Leave it out", newer.path.parent, reason)
    return placed


def _check_rates(
    placed: Sequence[Checkpoint], summaries: Sequence[CommonSummary], allow_lr_decay: bool
) -> None:
    rates = [
        (c.iteration, said.learning_rate)
        for c, said in zip(placed, summaries, strict=True)
        if said.learning_rate is not None
    ]
    problem = lr_problem(rates)
    if problem is None:
        return
    if problem.refused and not allow_lr_decay:
        raise UsageError(problem.message)
    logger.warning("sources: %s", problem.message)

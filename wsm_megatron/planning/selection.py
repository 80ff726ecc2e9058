"""Which checkpoints of a run a merge is of, and whether the run says that they belong together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from wsm_megatron.checkpoint.common_state import CommonSummary, read_summary
from wsm_megatron.checkpoint.foreign_formats import UNFINISHED
from wsm_megatron.checkpoint.lr_schedule import LearningRate
from wsm_megatron.checkpoint.run_directory import (
    TRACKER_FILE,
    RunDirectory,
    Unusable,
    checkpoint_name,
    scan_run,
    why_untracked,
)
from wsm_megatron.errors import UsageError
from wsm_megatron.planning.learning_rate import lr_problem
from wsm_megatron.schedule.window import (
    Checkpoint,
    Consumed,
    Window,
    count_tokens,
    select,
    slide,
    why_iterations,
)

logger = logging.getLogger(__name__)

_ELSEWHERE = (
    ". Where metadata.json lies on another node, start a rank on every node with --node-local"
)

Selections = tuple[tuple[Checkpoint, ...], ...]

_CLOCK = (
    1.0  # seconds by which files written one after the other may seem to be the other way round
)


class Selector:
    """Finds the checkpoints of windows in one run.

    Args:
        run: what is in its directory.
        read: what a finished checkpoint says of itself; asked for those that matter.
        allow_lr_decay: warn where the learning rate changes inside a window; without, refuse.
    """

    def __init__(
        self,
        run: RunDirectory,
        read: Callable[[int], CommonSummary],
        allow_lr_decay: bool = False,
    ) -> None:
        self._run, self._read, self._allow_lr_decay = run, cache(read), allow_lr_decay
        self._said: set[str] = set()

    def select(self, window: Window, sliding_every: int | None = None) -> Selections:
        """The checkpoints of a window, with their tokens, oldest first; of all windows that slide.

        Warns by name of what is left out, and of what looks like another run or branch.

        Raises:
            UsageError: the window does not fit the run, or is of checkpoints that do not belong
                together. MergeError: a checkpoint is damaged.
        """
        return tuple(map(self.place, self.choose(window, sliding_every)))

    def choose(self, window: Window, sliding_every: int | None = None) -> list[tuple[int, ...]]:
        """The iterations of :meth:`select`; reads summaries for a window in tokens only."""
        self._report_unusable(window)
        finished = self._reachable(window)
        if window.window_tokens is not None:
            available = self._counted_back(finished, window.to, window.window_tokens)
        else:
            available = [Checkpoint(i) for i in finished]
        if sliding_every is None:
            selections: Selections = (select(available, window),)
        else:
            selections = slide(available, window, sliding_every)
        return [tuple(c.iteration for c in chosen) for chosen in selections]

    def place(self, chosen: Sequence[int]) -> tuple[Checkpoint, ...]:
        """Chosen iterations as checkpoints with tokens and learning rate; checks them."""
        for iteration in chosen:
            said = self._read(iteration).iteration
            if said is not None and said != iteration:
                raise UsageError(self._misnamed(iteration, said))
        self._report_branches(chosen)
        chain = [chosen[0]]
        for older, newer in pairwise(chosen):
            chain += [*self._between(older, newer), newer]
        counted = {c.iteration: c for c in count_tokens(list(map(self._consumed, chain)))}
        rates = {i: self._read(i).learning_rate for i in chosen}
        self._check_rates([(i, rate) for i, rate in rates.items() if rate is not None])
        placed = [
            replace(counted[i], lr=None if (rate := rates[i]) is None else rate.value)
            for i in chosen
        ]
        if reason := why_iterations(placed):
            self._warn(f"{self._run.path}: positions are iterations, not tokens: {reason}")
        return tuple(placed)

    def _report_unusable(self, window: Window) -> None:
        run, named = self._run, {*(window.iterations or ()), window.from_, window.to} - {None}
        for one in run.unusable:
            what, way_out = one.kind
            if one.iteration in named and one.iteration not in run.finished:
                raise UsageError(f"{run.path / one.name} is {what}: {way_out}")
            if one.iteration is not None and run.finished:
                self._warn(f"{run.path / one.name} is {what} and left out: {way_out}")
        if not run.finished:
            unfinished = any(one.kind.what == UNFINISHED.what for one in run.unusable)
            what = "no checkpoint is finished" if unfinished else "no checkpoint that merges"
            hint = _ELSEWHERE if unfinished else ""
            raise UsageError(f"{run.path}: {what}: {_by_kind(run)}{hint}")

    def _reachable(self, window: Window) -> tuple[int, ...]:
        """The finished iterations; up to the tracker's, where the window does not say its end.

        What is newer was left by a branch that was given up, when the run went back, or its save
        ended between the checkpoint and the tracker: only the user knows.
        """
        run, tracked = self._run, self._run.tracked
        tracker = f"{run.path / TRACKER_FILE}"
        if tracked is None:
            if run.tracker is not None:
                self._warn(f"{tracker} {why_untracked(run.tracker)}; finished checkpoints count")
            return run.finished
        newer = [i for i in run.finished if i > tracked]
        if window.iterations is not None or window.to is not None:
            named = window.iterations or [i for i in newer if i <= (window.to or 0)]
            if beyond := [i for i in newer if i in named]:
                self._warn(
                    f"{run.path}: {TRACKER_FILE} says {tracked}, and {_folders(beyond)} was "
                    "finished all the same: left by a branch that was given up?"
                )
            return run.finished
        if len(newer) == len(run.finished):
            raise UsageError(
                f"{tracker} says {tracked}, and all finished checkpoints are newer "
                f"({_folders(newer)}): name the newest with --to"
            )
        if newer:
            self._warn(
                f"{run.path}: {TRACKER_FILE} says {tracked}; {_folders(newer)} is newer and left "
                "out: the run went back to before it, or ended before the tracker was written; "
                f"--to {newer[-1]} takes it"
            )
        return run.finished[: len(run.finished) - len(newer)]

    def _counted_back(
        self, finished: Sequence[int], to: int | None, length: int
    ) -> list[Checkpoint]:
        """All checkpoints, with tokens back to the first one beyond ``length`` before ``to``."""
        end = finished[-1] if to is None else to
        upto, size = [i for i in finished if i <= end], 2
        while True:
            counted = count_tokens([self._consumed(i) for i in upto[-size:]])
            start, newest = counted[0].tokens, counted[-1].tokens
            beyond = start is None or newest is None or newest - start > length
            if beyond or size >= len(upto):
                break
            size *= 2
        known = {c.iteration: c for c in counted}
        return [known.get(i, Checkpoint(i)) for i in finished]

    def _consumed(self, iteration: int) -> Consumed:
        said = self._read(iteration)
        return Consumed(iteration, said.consumed_samples, said.seq_length, said.began)

    def _between(self, older: int, newer: int) -> list[int]:
        """Checkpoints between two chosen ones that tell where the sequence length changed: those
        that jobs had started from; all, where jobs do not say it or contradict the lengths."""
        found: list[int] = []
        at, length = newer, self._read(older).seq_length
        while True:
            said = self._read(at)
            last = at - 1 if said.began is None else said.began
            if last <= older and said.seq_length != length:
                last = at - 1
            at = next((i for i in reversed(self._run.finished) if older < i <= last), older)
            if at == older:
                return found[::-1]
            holds = self._read(at).iteration
            if holds is not None and holds != at:
                self._warn(f"{self._misnamed(at, holds)}; its samples are not counted")
            else:
                found.append(at)

    def _misnamed(self, iteration: int, said: int) -> str:
        name = checkpoint_name(said)
        way_out = f"it was renamed or copied; rename it to {name}, or leave it out (--iterations)"
        if said in self._run.finished:
            way_out = f"a copy of {name}? leave it out (--iterations)"
        path = self._run.checkpoint(iteration)
        return f"{path} holds the state of iteration {said}: {way_out}"

    def _report_branches(self, chosen: Sequence[int]) -> None:
        for older, newer in pairwise(chosen):
            if reason := branch_problem(older, self._read(older), newer, self._read(newer)):
                self._warn(f"{self._run.path}: {reason} Leave it out (--iterations)")

    def _check_rates(self, rates: Sequence[tuple[int, LearningRate]]) -> None:
        problem = lr_problem(rates)
        if problem is None:
            return
        if problem.refused and not self._allow_lr_decay:
            raise UsageError(f"{self._run.path}: {problem.message}")
        self._warn(f"{self._run.path}: {problem.message}")

    def _warn(self, message: str) -> None:
        """Once a run, however many windows it concerns."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s", message)


def select_checkpoints(
    root: Path, window: Window, sliding_every: int | None = None, allow_lr_decay: bool = False
) -> Selections:
    """:meth:`Selector.select` in a run directory."""
    return selector(root, allow_lr_decay).select(window, sliding_every)


def selector(root: Path, allow_lr_decay: bool = False) -> Selector:
    """The selector of a run directory."""
    run = scan_run(root)
    return Selector(run, lambda i: read_summary(run.checkpoint(i)), allow_lr_decay)


def branch_problem(
    older: int, before: CommonSummary, newer: int, after: CommonSummary
) -> str | None:
    """Why the newer of two checkpoints of a run does not seem to come from the older one."""
    names = f"{checkpoint_name(older)} and {checkpoint_name(newer)}"
    if before.began is not None and after.began is not None:
        same_job = before.began == after.began and before.seq_length == after.seq_length
        if after.began < older and not same_job:
            return (
                f"{names} are of two branches: the job that saved the latter had started from "
                f"iteration {after.began}. Was one of the two given up?"
            )
    if before.finished is None or after.finished is None:
        return None
    if before.finished > after.finished + _CLOCK:
        return (
            f"{names} were finished in the other order, by the times of their metadata.json "
            "(unless a copy changed these). Is one of them of a branch that was given up?"
        )
    return None


def _by_kind(run: RunDirectory) -> str:
    """What is there instead of checkpoints, each kind once."""
    kinds: dict[str, list[Unusable]] = {}
    for one in run.unusable:
        kinds.setdefault(one.kind.way_out, []).append(one)
    others = {
        way_out: f" (and {len(same) - 1} more)" for way_out, same in kinds.items() if same[1:]
    }
    return "; ".join(
        f"{same[0].name}{others.get(way_out, '')} is {same[0].kind.what}: {way_out}"
        for way_out, same in kinds.items()
    )


def _folders(iterations: Sequence[int]) -> str:
    names = [checkpoint_name(i) for i in iterations]
    if len(names) > 6:
        names[3:-3] = ["..."]
    return ", ".join(names)

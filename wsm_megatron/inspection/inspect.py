"""What is in a checkpoint or a run. Reads metadata and the common state only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from wsm_megatron.checkpoint.common_state import (
    CommonSummary,
    load_common,
    read_common,
    read_summary,
    summary_of,
)
from wsm_megatron.checkpoint.formats import CheckpointFormat
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import (
    METADATA_FILE,
    ObjectEntry,
    TensorEntry,
    read_layout,
)
from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.run_directory import (
    RunDirectory,
    Unusable,
    checkpoint_name,
    scan_run,
    why_untracked,
)
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.planning.selection import branch_problem
from wsm_megatron.planning.sources import save_id
from wsm_megatron.schedule.window import Checkpoint, Consumed, count_tokens


@dataclass(frozen=True)
class CheckpointContents:
    """Entries of a checkpoint by role, and what its common state says."""

    path: Path
    summary: CommonSummary
    by_role: dict[Role, tuple[TensorEntry | ObjectEntry, ...]]
    provenance: dict | None
    format: CheckpointFormat

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entries in self.by_role.values() for entry in entries)


@dataclass(frozen=True)
class RunCheckpoint:
    """A finished checkpoint of a run.

    Attributes:
        tokens: counted from the run's first checkpoint on; None where that is not possible.
        lr: its learning rate, where it says it.
        marks: what is wrong with it, or may be.
    """

    iteration: int
    tokens: int | None
    is_merged: bool
    lr: float | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunContents:
    """Checkpoints of a run, oldest first, and what else lies there.

    Attributes:
        tracker_problem: why the tracker names no checkpoint, as a clause after its name.
    """

    path: Path
    checkpoints: tuple[RunCheckpoint, ...]
    unfinished: tuple[int, ...]
    unusable: tuple[Unusable, ...]
    tracker: str | None
    tracker_problem: str | None = None


def inspect_checkpoint(path: Path) -> CheckpointContents:
    """List one checkpoint's entries.

    Raises:
        UsageError: not a finished checkpoint. MergeError: a damaged one.
    """
    layout = read_layout(path)
    summary = summary_of(path, load_common(*read_common(path, layout)))
    by_role: dict[Role, list[TensorEntry | ObjectEntry]] = {}
    for entry in layout.entries.values():
        by_role.setdefault(entry.role, []).append(entry)
    ordered = {role: tuple(by_role[role]) for role in Role if role in by_role}
    return CheckpointContents(path, summary, ordered, read_provenance(path), layout.format)


def inspect_run(path: Path) -> RunContents:
    """List a run's checkpoints. One that cannot be read is marked, and hides no other."""
    run = scan_run(path)
    found = {i: _look(run, i) for i in run.finished}
    summaries = {i: one.summary for i, one in found.items() if one.summary is not None}
    tokens = {c.iteration: c for c in _counted(summaries)}
    marks = _marks(run, found, tokens)
    checkpoints = []
    for i, one in found.items():
        rate = None if one.summary is None else one.summary.learning_rate
        counted = tokens[i].tokens if i in tokens else None
        lr = None if rate is None else rate.value
        checkpoints.append(RunCheckpoint(i, counted, one.is_merged, lr, tuple(marks[i])))
    return RunContents(
        path,
        tuple(checkpoints),
        run.unfinished,
        run.unusable,
        run.tracker,
        None if run.tracker is None else _tracker_problem(run, run.tracker),
    )


@dataclass(frozen=True)
class _Look:
    """What one finished checkpoint of a run says; ``problem`` where it cannot be read."""

    summary: CommonSummary | None = None
    is_merged: bool = False
    save: str | None = None
    problem: str | None = None


def _look(run: RunDirectory, iteration: int) -> _Look:
    path = run.checkpoint(iteration)
    try:
        return _Look(
            read_summary(path),
            read_provenance(path) is not None,
            save_id(read_file(path / METADATA_FILE)),
        )
    except (UsageError, MergeError) as error:
        return _Look(problem=str(error).removeprefix(f"{path}").lstrip(": "))


def _counted(summaries: dict[int, CommonSummary]) -> tuple[Checkpoint, ...]:
    return count_tokens(
        [Consumed(i, s.consumed_samples, s.seq_length, s.began) for i, s in summaries.items()]
    )


def _marks(
    run: RunDirectory, found: dict[int, _Look], tokens: dict[int, Checkpoint]
) -> dict[int, list[str]]:
    """What is wrong with each checkpoint, or may be."""
    marks: dict[int, list[str]] = {i: [] for i in found}
    saves: dict[str, int] = {}
    for i, one in found.items():
        if one.problem is not None:
            marks[i].append(one.problem)
        if run.tracked is not None and i > run.tracked:
            marks[i].append("newer than the tracker")
        if one.summary is not None and one.summary.iteration not in (None, i):
            marks[i].append(f"holds the state of iteration {one.summary.iteration}")
        if one.save is not None and (first := saves.setdefault(one.save, i)) != i:
            marks[i].append(f"the same save as {checkpoint_name(first)}")
    for unknown, i in {c.unknown: i for i, c in tokens.items() if c.unknown}.items():
        marks[i].append(unknown)  # of all that cannot be counted for one reason, on the newest
    for a, b in pairwise(sorted(i for i, one in found.items() if one.summary is not None)):
        before, after = found[a].summary, found[b].summary
        assert before is not None and after is not None
        if reason := branch_problem(a, before, b, after):
            marks[a].append(reason)
    return marks


def _tracker_problem(run: RunDirectory, tracker: str) -> str | None:
    if run.tracked is None:
        return why_untracked(tracker)
    if run.tracked not in run.finished:
        others = [one.kind.what for one in run.unusable if one.iteration == run.tracked]
        what = f"which is {others[0]}" if others else "of which there is no finished checkpoint"
        return f"names iteration {run.tracked}, {what}"
    return None

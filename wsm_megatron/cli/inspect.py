"""``wsm inspect``: what is in a checkpoint or a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from typing import Any

from wsm_megatron.checkpoint.common_state import CommonSummary
from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.figures import known_tokens, size
from wsm_megatron.cli.reporting import add_report_flag
from wsm_megatron.cli.trajectory import (
    add_trajectory_flags,
    inspect_trajectory,
    refuse_trajectory_flags,
)
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.inspect import (
    CheckpointContents,
    RunContents,
    inspect_checkpoint,
    inspect_run,
)
from wsm_megatron.inspection.lookup import is_checkpoint, is_tracker, roots_at, tracked_checkpoint
from wsm_megatron.options import local_path, typed
from wsm_megatron.pictures.report import Report


def add_inspect(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "inspect", _inspect, help)
    command.add_argument(
        "directory",
        type=typed(local_path),
        help="a checkpoint, a tracker, a root of checkpoints or a folder of roots",
    )
    command.add_argument("--entries", action="store_true", help="list every entry")
    add_report_flag(command)
    add_trajectory_flags(command)


def _inspect(arguments: argparse.Namespace) -> Answer:
    path = arguments.directory
    if arguments.trajectory:
        return inspect_trajectory(arguments)
    refuse_trajectory_flags(arguments)
    if is_tracker(path):
        path = tracked_checkpoint(path)
    if is_checkpoint(path):
        if arguments.report is not None:
            raise UsageError(f"{path} is one checkpoint; --report is of a run directory")
        contents = inspect_checkpoint(path)
        lines = _checkpoint(contents, arguments.entries)
        return Answer(lines, lambda: _checkpoint_data(contents), shown=True)
    roots = roots_at(path)
    found = [inspect_run(root) for root in roots]
    if arguments.report is not None:
        if roots != [path]:
            raise UsageError(f"{path} holds {len(roots)} roots; --report is of one")
        Report(title=str(path), run=found[0]).write(arguments.report)
    lines = chain.from_iterable(map(_run, found))
    if roots == [path]:
        return Answer(lines, lambda: _run_data(found[0]), shown=True)
    return Answer(lines, lambda: {"roots": [_run_data(one) for one in found]}, shown=True)


def _checkpoint(contents: CheckpointContents, entries: bool) -> Iterator[str]:
    said = contents.summary
    yield f"{contents.path}: iteration {said.iteration}, tokens {_counted(said)}"
    form = contents.format
    yield f"  {form.name}, finished by {form.finished_by}, common state: {form.container}"
    if said.learning_rate is not None:
        yield f"  learning rate {said.learning_rate.value:.6g}"
    for role, found in contents.by_role.items():
        total = sum(entry.nbytes for entry in found)
        yield f"  {role.value:16} {len(found):6} entries {size(total):>9}"
        if entries:
            for entry in sorted(found, key=lambda entry: entry.key):
                yield f"    {entry.key} {_shape(entry)}"
    yield f"  {'all':16} {'':6}         {size(contents.nbytes):>9}"
    if contents.provenance is not None:
        merged_from = ", ".join(map(_source, contents.provenance["sources"]))
        when = contents.provenance.get("date")  # the first ones have none
        yield f"  merged{'' if when is None else f' on {when}'} from iterations {merged_from}"


def _source(said: dict[str, Any]) -> str:
    """A source of a merge; of one inside a run it may be an average over steps."""
    text = str(said["iteration"])
    if "mean" in said:
        return f"{text} (mean of {said['mean']['points']} steps)"
    return f"{text} (moving average)" if "moving_average" in said else text


def _checkpoint_data(contents: CheckpointContents) -> dict[str, Any]:
    return {
        "path": str(contents.path),
        "iteration": contents.summary.iteration,
        "tokens": contents.summary.tokens,
        "bytes": contents.nbytes,
        "format": contents.format.name,
        "finished_by": contents.format.finished_by,
        "entries": {
            entry.key: {
                "role": role.value,
                "dtype": str(getattr(entry, "dtype", "bytes")).removeprefix("torch."),
                "shape": list(getattr(entry, "shape", ())),
                "bytes": entry.nbytes,
            }
            for role, found in contents.by_role.items()
            for entry in found
        },
        "provenance": contents.provenance,
    }


def _run(contents: RunContents) -> Iterator[str]:
    tracker = "missing" if contents.tracker is None else contents.tracker or "empty"
    yield f"{contents.path}: tracker {tracker}"
    if contents.tracker_problem:
        yield f"  the tracker {contents.tracker_problem}"
    for one in contents.checkpoints:
        kind = "merged" if one.is_merged else "trained"
        lr = "" if one.lr is None else f"  LR {one.lr:.4g}"
        line = f"  iteration {one.iteration:>9}  tokens {known_tokens(one.tokens):>16}  {kind}{lr}"
        yield "; ".join([line, *one.marks])
    for unusable in contents.unusable:
        yield f"  {unusable}"


def _run_data(contents: RunContents) -> dict[str, Any]:
    return {
        "path": str(contents.path),
        "tracker": contents.tracker,
        "tracker_problem": contents.tracker_problem,
        "checkpoints": [
            {
                "iteration": one.iteration,
                "tokens": one.tokens,
                "merged": one.is_merged,
                "lr": one.lr,
                "marks": list(one.marks),
            }
            for one in contents.checkpoints
        ],
        "unfinished": list(contents.unfinished),
        "unusable": [
            {"name": one.name, "what": one.kind.what, "way_out": one.kind.way_out}
            for one in contents.unusable
        ],
    }


def _shape(entry: Any) -> str:
    if not hasattr(entry, "shape"):
        return f"({entry.nbytes} bytes)"
    dtype = str(entry.dtype).removeprefix("torch.")
    return f"{dtype} {list(entry.shape)} in {len(entry.chunks)} chunks"


def _counted(said: CommonSummary) -> str:
    if said.tokens is None:
        return "unknown"
    return f"{said.tokens:,} ({said.consumed_samples:,} samples of {said.seq_length:,})"

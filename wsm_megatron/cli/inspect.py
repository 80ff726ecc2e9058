"""``wsm inspect``: what is in a checkpoint or a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from wsm_megatron.api import trajectory
from wsm_megatron.checkpoint.common_state import CommonSummary
from wsm_megatron.cli.command import Answer, LocalLaunch, add
from wsm_megatron.cli.figures import known_tokens, size
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.cli.reporting import add_report_flag
from wsm_megatron.cli.trajectory_text import trajectory_lines
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import JOB, ExecutionOptions, MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.inspect import (
    CheckpointContents,
    RunContents,
    inspect_checkpoint,
    inspect_run,
    is_checkpoint,
)
from wsm_megatron.inspection.trajectory import write_trajectory
from wsm_megatron.options import Given, add_flags, given_flags, local_path, typed
from wsm_megatron.pictures.report import Report
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.window_options import WHICH, WindowOptions

_WINDOW = tuple(one for one in WindowOptions.options() if one.name != "sliding_every")
_JOB = (
    *(one for one in ExecutionOptions.options() if one.name in ("threads", "memory", "retries")),
    *LocalLaunch.options(),
)


def add_inspect(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "inspect", _inspect, help)
    command.add_argument("directory", type=typed(local_path))
    command.add_argument("--entries", action="store_true", help="list every entry")
    add_report_flag(command)
    group = command.add_argument_group("the path of a run (reads all of its weights)")
    group.add_argument(
        "--trajectory",
        action="store_true",
        help="norms, distances and angles of its checkpoints, what each decay would average away, "
        "and which lie off the path",
    )
    group.add_argument(
        "--main-params", action="store_true", help="of the main params rather than the model"
    )
    group.add_argument(
        "--out", type=typed(local_path), metavar="DIR", help="also write DIR/trajectory.json"
    )
    add_flags(command.add_argument_group(f"{WHICH} of --trajectory"), _WINDOW)
    add_flags(command.add_argument_group(JOB), _JOB)


def _inspect(arguments: argparse.Namespace) -> Answer:
    path = arguments.directory
    given = given_flags(arguments, (*_WINDOW, *_JOB))
    if arguments.trajectory:
        return _trajectory(arguments, given)
    if given.values or arguments.main_params or arguments.out:
        raise UsageError("options of a window and of how it is read go with --trajectory")
    if is_checkpoint(path):
        if arguments.report is not None:
            raise UsageError(f"{path} is one checkpoint; --report is of a run directory")
        contents = inspect_checkpoint(path)
        lines = _checkpoint(contents, arguments.entries)
        return Answer(lines, lambda: _checkpoint_data(contents), shown=True)
    run = inspect_run(path)
    if arguments.report is not None:
        Report(title=str(path), run=run).write(arguments.report)
    return Answer(_run(run), lambda: _run_data(run), shown=True)


def _trajectory(arguments: argparse.Namespace, given: Given) -> Answer:
    run, out = arguments.directory, arguments.out
    if is_checkpoint(run):
        raise UsageError(f"{run} is one checkpoint; --trajectory is of a run directory")
    config = MergeConfig(
        load=run,
        save=run / "wsm",  # nothing is written there
        optimizer_state="last" if arguments.main_params else "drop",
        allow_lr_decay=True,
        **given.of(WindowOptions),
    )
    if len(config.windows) > 1:
        raise UsageError("--trajectory looks at one window at a time")
    execution = ExecutionOptions(**given.of(ExecutionOptions))

    def on_rank(ranks: Ranks) -> Answer:
        reading = partial(progress_bar, doing="reading")
        found = trajectory(MergeSet.of(config), execution, reading)
        if found is None:
            return Answer()
        if out is not None:
            write_trajectory(out, found)
        if arguments.report is not None:
            page = Report(title=str(run), run=inspect_run(run), trajectory=found)
            page.write(arguments.report)
        lines = trajectory_lines(found, verbose=arguments.verbose)
        return Answer(lines, found.summary, shown=True)

    return on_ranks(arguments, LocalLaunch(**given.of(LocalLaunch)), on_rank)


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
        merged_from = ", ".join(str(s["iteration"]) for s in contents.provenance["sources"])
        yield f"  merged from iterations {merged_from}"


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

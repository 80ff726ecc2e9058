"""``wsm inspect --trajectory``: flags, and the answer."""

from __future__ import annotations

import argparse
from functools import partial

from wsm_megatron.api import trajectory
from wsm_megatron.cli.command import Answer, LocalLaunch
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.cli.trajectory_text import trajectory_lines
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import JOB, ExecutionOptions, MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.inspect import inspect_run
from wsm_megatron.inspection.lookup import is_checkpoint
from wsm_megatron.inspection.trajectory import write_trajectory
from wsm_megatron.options import add_flags, given_flags, local_path, typed
from wsm_megatron.pictures.report import Report
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.window_options import WHICH, WindowOptions

_WINDOW = tuple(one for one in WindowOptions.options() if one.name != "sliding_every")
_JOB = (
    *(one for one in ExecutionOptions.options() if one.name in ("threads", "memory", "retries")),
    *LocalLaunch.options(),
)


def add_trajectory_flags(command: argparse.ArgumentParser) -> None:
    """Add ``--trajectory`` and what goes with it."""
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


def refuse_trajectory_flags(arguments: argparse.Namespace) -> None:
    """Raise ``UsageError`` for flags that have no effect without ``--trajectory``."""
    given = given_flags(arguments, (*_WINDOW, *_JOB))
    if given.values or arguments.main_params or arguments.out:
        raise UsageError("options of a window and of how it is read go with --trajectory")


def inspect_trajectory(arguments: argparse.Namespace) -> Answer:
    """The command with ``--trajectory``."""
    given = given_flags(arguments, (*_WINDOW, *_JOB))
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

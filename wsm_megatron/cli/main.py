"""``wsm merge | plan | coefficients | inspect | verify | resume-check``: parse, build, call."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from wsm_megatron.api import merge_and_export, plan, plan_exports
from wsm_megatron.cli import text
from wsm_megatron.cli.command import (
    Answer,
    LocalLaunch,
    add,
    add_job,
    given_options,
    on_ranks,
    run_command,
)
from wsm_megatron.cli.export import add_export
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.search import add_search
from wsm_megatron.cli.select import add_select
from wsm_megatron.cli.sweep import add_sweep
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME, StoppedError, UsageError
from wsm_megatron.export.options import MergeExport
from wsm_megatron.inspection.inspect import inspect_checkpoint, inspect_run, is_checkpoint
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.inspection.verify import SOURCES, verify
from wsm_megatron.options import (
    Given,
    add_flags,
    count,
    given_flags,
    local_path,
    several,
    typed,
)
from wsm_megatron.planning.selection import select_checkpoints
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.window_options import WindowOptions

logger = logging.getLogger(__name__)


JOB_OPTIONS = (
    *MergeConfig.options(),
    *MergeExport.options(),
    *ExecutionOptions.options(),
    *LocalLaunch.options(),
)
"""What ``--config`` may set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``wsm``; returns the exit status."""
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_Log()]
    )
    arguments = _parser().parse_args(_with_negative_values(sys.argv[1:] if argv is None else argv))
    logging.getLogger("wsm_megatron").setLevel(
        logging.INFO if arguments.verbose else logging.WARNING
    )
    return run_command(arguments, arguments.run)


class _Log(logging.StreamHandler):
    """Standard error. A signal that comes up while a line is written is none of its failures."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, StoppedError):
            raise error
        super().handleError(record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsm", description="Merge Megatron checkpoints: the effect of LR decay, without it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_job(commands, "merge", _merge, "merge checkpoints of a run into one", JOB_OPTIONS)
    planned = [one for one in JOB_OPTIONS if one not in LocalLaunch.options()]
    add_job(commands, "plan", _plan, "say everything that merge would do; write nothing", planned)
    add_sweep(commands)
    add_select(commands)
    add_search(commands)
    _add_coefficients(commands)
    add_export(commands)
    command = add(commands, "inspect", _inspect, "what is in a checkpoint or a run")
    command.add_argument("directory", type=_path)
    command.add_argument("--entries", action="store_true", help="list every entry")
    command = add(commands, "verify", _verify, "check a checkpoint on disk, every byte")
    command.add_argument("directory", type=_path, nargs="?")
    command.add_argument(
        "--sources",
        nargs="?",
        const="sample",
        metavar="all|sample",
        help="make the merge again from its sources and compare it bit for bit: some elements of "
        "every tensor, or all",
    )
    command.add_argument(
        "--sources-from",
        type=_path,
        metavar="RUN",
        help="the run directory where the sources are now (default: where they were merged from)",
    )
    command.add_argument("--allow-nonfinite", action="store_true", help="let NaN and Inf pass")
    command = add(commands, "resume-check", _resume_check, "say whether and how Megatron resumes")
    command.add_argument("directory", type=_path, help="a checkpoint, or a root with a tracker")
    command.add_argument(
        "--against", type=_path, help="a run or checkpoint whose launch line is to resume from it"
    )
    return parser


def _add_coefficients(commands: Any) -> None:
    command = add(commands, "coefficients", _coefficients, "coefficients of a decay")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--num", type=_count, help="N checkpoints, evenly spaced")
    where.add_argument("--positions", type=_counts, help="positions: 1000,2000,4000")
    where.add_argument("--load", type=_path, help="a run directory")
    add_flags(command.add_argument_group("which checkpoints of --load"), _WINDOW)
    add_flags(command.add_argument_group("how"), _COEFFICIENTS)


_path, _count, _counts = typed(local_path), typed(count), typed(several(count))
_WINDOW = WindowOptions.options()
_WEIGHING = (
    "decay", "min_decay", "order", "order_seed", "weights", "allow_unnormalized", "normalize",
)  # fmt: skip
_COEFFICIENTS = [one for one in MergeConfig.options() if one.name in _WEIGHING]


def _with_negative_values(arguments: Sequence[str]) -> list[str]:
    """``--weights -0.5,1.5`` as ``--weights=-0.5,1.5``: argparse sees an option there."""
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        if re.match(r"-[0-9.]", argument) and before.startswith("--") and "=" not in before:
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


@dataclass(frozen=True)
class _Job:
    """A merge, as flags and file say; both are read once, before any rank is started."""

    given: Given
    config: MergeConfig
    export: MergeExport
    execution: ExecutionOptions
    launch: LocalLaunch

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> _Job:
        given = given_options(arguments, JOB_OPTIONS)
        return cls(
            given,
            MergeConfig(**given.of(MergeConfig)),
            MergeExport(**given.of(MergeExport)),
            ExecutionOptions(**given.of(ExecutionOptions)),
            LocalLaunch(**given.of(LocalLaunch)),
        )


def _merge(arguments: argparse.Namespace) -> Answer:
    job = _Job.of(arguments)

    def on_rank(ranks: Ranks) -> Answer:
        if ranks.rank == 0:
            job.given.tell_renamed()
        done, exports = merge_and_export(job.config, job.export, job.execution, progress_bar)
        if ranks.rank != 0:
            return Answer()
        return Answer(
            chain(text.merged(done), *map(text.exported, exports)),
            lambda: done.as_data() | {"exports": [one.as_data() for one in exports]},
        )

    return on_ranks(arguments, job.launch, on_rank)


def _plan(arguments: argparse.Namespace) -> Answer:
    job = _Job.of(arguments)
    with job_ranks() as ranks:
        if ranks.rank == 0:
            job.given.tell_renamed()
        planned = plan(job.config, job.execution)
    if planned is None:
        return Answer()
    found, moved = planned
    exports = plan_exports(found, job.export, job.config.save)
    lines = chain(text.planned(found, moved), *starmap(text.would_export, exports))
    return Answer(lines, lambda: text.plan_data(found, moved), shown=True)


def _coefficients(arguments: argparse.Namespace) -> Answer:
    decay = _decay(arguments)
    of_run = text.unit_data(decay) if arguments.load is not None else {}
    data = {**text.decay_data(decay), **of_run}
    return Answer(text.decay_table(decay), lambda: data, shown=True)


def _decay(arguments: argparse.Namespace) -> MergeCoefficients:
    root = arguments.load or Path("run")
    given = given_flags(arguments, [*_WINDOW, *_COEFFICIENTS]).values
    config = MergeConfig(load=root, save=root / "wsm", **given)
    if arguments.load is None:
        if chosen := [one.flag for one in _WINDOW if one.name in given]:
            raise UsageError(f"{chosen[0]} selects checkpoints of a run: give --load")
        checkpoints = _numbered(arguments)
    else:
        (checkpoints,) = select_checkpoints(root, config.windows[0], allow_lr_decay=True)
    if len(config.windows) * len(config.decays) > 1 or config.sliding_every is not None:
        raise UsageError("coefficients shows one decay over one window at a time")
    return config.weigh(checkpoints)


def _numbered(arguments: argparse.Namespace) -> tuple[Checkpoint, ...]:
    if arguments.num is not None and arguments.num < 2:
        raise UsageError(f"--num {arguments.num}: a merge needs at least two checkpoints")
    numbers = arguments.positions or tuple(range(1, arguments.num + 1))
    if list(numbers) != sorted(set(numbers)):
        raise UsageError("--positions must increase")
    return tuple(Checkpoint(number) for number in numbers)


def _inspect(arguments: argparse.Namespace) -> Answer:
    path = arguments.directory
    if is_checkpoint(path):
        contents = inspect_checkpoint(path)
        lines = text.checkpoint(contents, arguments.entries)
        return Answer(lines, lambda: text.checkpoint_data(contents), shown=True)
    run = inspect_run(path)
    return Answer(text.run(run), lambda: text.run_data(run), shown=True)


def _verify(arguments: argparse.Namespace) -> Answer:
    directory, sources = arguments.directory, arguments.sources
    if directory is None and sources not in (None, *SOURCES):  # `--sources DIRECTORY`
        directory, sources = Path(sources), "sample"
    if directory is None:
        raise UsageError("name the checkpoint, an iter_XXXXXXX directory")
    done = verify(
        directory,
        sources=sources or False,
        sources_from=arguments.sources_from,
        allow_nonfinite=arguments.allow_nonfinite,
    )
    return Answer(text.verified(done), lambda: {**asdict(done), "path": str(done.path)})


def _resume_check(arguments: argparse.Namespace) -> Answer:
    found = check_resume(arguments.directory, arguments.against)
    status = 0 if found.resumes else EXIT_DOES_NOT_RESUME
    return Answer(text.resume(found), lambda: text.resume_data(found), status)

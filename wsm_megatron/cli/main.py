"""``wsm merge | plan | coefficients | inspect | verify | resume-check``: parse, build, call."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from wsm_megatron.api import merge_and_export, plan, plan_exports
from wsm_megatron.cli import text
from wsm_megatron.cli.export import add_export, export_options
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import LocalLaunch, rank_of_command
from wsm_megatron.comm.communicator import job_ranks
from wsm_megatron.comm.local_ranks import run_forked
from wsm_megatron.config import WHICH, ExecutionOptions, MergeConfig
from wsm_megatron.errors import (
    EXIT_DOES_NOT_RESUME,
    EXIT_FAILED,
    StoppedError,
    UsageError,
    exit_code,
    is_internal,
    is_told,
)
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.inspection.inspect import inspect_checkpoint, inspect_run, is_checkpoint
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.inspection.verify import SOURCES, verify
from wsm_megatron.options import (
    PATH,
    Given,
    Option,
    Options,
    add_flags,
    count,
    given_flags,
    local_path,
    option,
    read_yaml,
    several,
    typed,
)
from wsm_megatron.planning.selection import select_checkpoints
from wsm_megatron.process.streams import say, show
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _File(Options):
    config: Path | None = option(
        "YAML file of the options below (last: 8, decay: 1-sqrt); flags win over it",
        PATH,
        None,
        metavar="FILE",
    )


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
    return _status(arguments, arguments.run)


@dataclass(frozen=True)
class _Answer:
    """What a command has to say once it is done.

    Attributes:
        data: for ``--json``.
        status: the exit status.
        shown: whether showing it is all that the command is for.
    """

    lines: Iterable[str] = ()
    data: Callable[[], dict[str, Any]] = dict
    status: int = 0
    shown: bool = False


_Command = Callable[[argparse.Namespace], "_Answer"]


class _Log(logging.StreamHandler):
    """Standard error. A signal that comes up while a line is written is none of its failures."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, StoppedError):
            raise error
        super().handleError(record)


def _status(arguments: argparse.Namespace, run: _Command) -> int:
    """The exit status of a command, its answer or its error printed."""
    name = f"wsm {arguments.command}"
    try:
        timeouts.read(os.environ)
        answer = run(arguments)
        lines = list(answer.lines)
        if lines and arguments.json:
            lines.append(json.dumps(answer.data()))
        failure = show(lines)
    except KeyboardInterrupt:
        say(f"{name}: stopped by SIGINT")
        return 128 + signal.SIGINT
    except Exception as error:
        if not is_told(error):
            if is_internal(error):
                raise
            say(f"{name}: {error}")
        return exit_code(error)
    if failure is not None:
        done = "" if answer.shown else "it is done, but "
        say(f"{name}: {done}standard output cannot be written: {failure.strerror}")
    return answer.status or (EXIT_FAILED if failure is not None and answer.shown else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsm", description="Merge Megatron checkpoints: the effect of LR decay, without it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_job(commands, "merge", _merge, "merge checkpoints of a run into one", JOB_OPTIONS)
    planned = [one for one in JOB_OPTIONS if one not in LocalLaunch.options()]
    _add_job(commands, "plan", _plan, "say everything that merge would do; write nothing", planned)
    _add_coefficients(commands)
    add_export(_add(commands, "export", _export, "write a checkpoint's weights for others"))
    command = _add(commands, "inspect", _inspect, "what is in a checkpoint or a run")
    command.add_argument("directory", type=_path)
    command.add_argument("--entries", action="store_true", help="list every entry")
    command = _add(commands, "verify", _verify, "check a checkpoint on disk, every byte")
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
    command = _add(commands, "resume-check", _resume_check, "say whether and how Megatron resumes")
    command.add_argument("directory", type=_path, help="a checkpoint, or a root with a tracker")
    command.add_argument(
        "--against", type=_path, help="a run or checkpoint whose launch line is to resume from it"
    )
    return parser


def _add(commands: Any, name: str, run: _Command, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.add_argument("--json", action="store_true", help="last line of output: a JSON object")
    command.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    command.set_defaults(run=run)
    return command


def _add_job(commands: Any, name: str, run: _Command, help: str, options: Sequence[Option]) -> None:
    command = _add(commands, name, run, help)
    add_flags(command, _File.options())
    for title in dict.fromkeys(one.group for one in options):
        group = command.add_argument_group(title)
        add_flags(group, [one for one in options if one.group == title])


def _add_coefficients(commands: Any) -> None:
    command = _add(commands, "coefficients", _coefficients, "coefficients of a decay")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--num", type=_count, help="N checkpoints, evenly spaced")
    where.add_argument("--positions", type=_counts, help="positions: 1000,2000,4000")
    where.add_argument("--load", type=_path, help="a run directory")
    add_flags(command.add_argument_group("which checkpoints of --load"), _WINDOW)
    add_flags(command.add_argument_group("how"), _COEFFICIENTS)


_path, _count, _counts = typed(local_path), typed(count), typed(several(count))
_WINDOW = [one for one in MergeConfig.options() if one.group == WHICH]
_COEFFICIENTS = [
    one
    for one in MergeConfig.options()
    if one.name in ("decay", "min_decay", "weights", "allow_unnormalized")
]


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
        file = _File(**given_flags(arguments, _File.options()).values).config
        given = given_flags(arguments, JOB_OPTIONS)
        if file is not None:
            given = read_yaml(file, JOB_OPTIONS, "--config") | given
        missing = [one.flag for one in JOB_OPTIONS if one.required and one.name not in given.values]
        if missing:
            raise UsageError(f"give {' and '.join(missing)}, as flags or in the file of --config")
        return cls(
            given,
            MergeConfig(**given.of(MergeConfig)),
            MergeExport(**given.of(MergeExport)),
            ExecutionOptions(**given.of(ExecutionOptions)),
            LocalLaunch(**given.of(LocalLaunch)),
        )


def _merge(arguments: argparse.Namespace) -> _Answer:
    job = _Job.of(arguments)
    ranks = job.launch.local_ranks
    if ranks is None:
        return _merge_on_rank(job)
    rank = partial(_status, arguments, lambda _: _merge_on_rank(job))
    return _Answer(status=run_forked(ranks, rank))


def _merge_on_rank(job: _Job) -> _Answer:
    with rank_of_command() as ranks:
        if ranks.rank == 0:
            job.given.tell_renamed()
        done, exports = merge_and_export(job.config, job.export, job.execution, progress_bar)
        if ranks.rank != 0:
            return _Answer()
    return _Answer(
        chain(text.merged(done), *map(text.exported, exports)),
        lambda: done.as_data() | {"exports": [one.as_data() for one in exports]},
    )


def _export(arguments: argparse.Namespace) -> _Answer:
    config, execution, ranks = export_options(arguments)
    if ranks is None:
        return _export_on_rank(config, execution)
    rank = partial(_status, arguments, lambda _: _export_on_rank(config, execution))
    return _Answer(status=run_forked(ranks, rank))


def _export_on_rank(config: ExportConfig, execution: ExecutionOptions) -> _Answer:
    with rank_of_command() as ranks:
        done = export(config, execution, partial(progress_bar, doing="exporting"))
        if ranks.rank != 0:
            return _Answer()
    return _Answer(text.exported(done), done.as_data)


def _plan(arguments: argparse.Namespace) -> _Answer:
    job = _Job.of(arguments)
    with job_ranks() as ranks:
        if ranks.rank == 0:
            job.given.tell_renamed()
        planned = plan(job.config, job.execution)
    if planned is None:
        return _Answer()
    found, moved = planned
    exports = plan_exports(found, job.export, job.config.save)
    lines = chain(text.planned(found, moved), *starmap(text.would_export, exports))
    return _Answer(lines, lambda: text.plan_data(found, moved), shown=True)


def _coefficients(arguments: argparse.Namespace) -> _Answer:
    decay = _decay(arguments)
    of_run = text.unit_data(decay) if arguments.load is not None else {}
    data = {**text.decay_data(decay), **of_run}
    return _Answer(text.decay_table(decay), lambda: data, shown=True)


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
    return MergeCoefficients.over(
        checkpoints, config.decays[0], config.min_decay, config.weights, config.allow_unnormalized
    )


def _numbered(arguments: argparse.Namespace) -> tuple[Checkpoint, ...]:
    if arguments.num is not None and arguments.num < 2:
        raise UsageError(f"--num {arguments.num}: a merge needs at least two checkpoints")
    numbers = arguments.positions or tuple(range(1, arguments.num + 1))
    if list(numbers) != sorted(set(numbers)):
        raise UsageError("--positions must increase")
    return tuple(Checkpoint(number) for number in numbers)


def _inspect(arguments: argparse.Namespace) -> _Answer:
    path = arguments.directory
    if is_checkpoint(path):
        contents = inspect_checkpoint(path)
        lines = text.checkpoint(contents, arguments.entries)
        return _Answer(lines, lambda: text.checkpoint_data(contents), shown=True)
    run = inspect_run(path)
    return _Answer(text.run(run), lambda: text.run_data(run), shown=True)


def _verify(arguments: argparse.Namespace) -> _Answer:
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
    return _Answer(text.verified(done), lambda: {**asdict(done), "path": str(done.path)})


def _resume_check(arguments: argparse.Namespace) -> _Answer:
    found = check_resume(arguments.directory, arguments.against)
    status = 0 if found.resumes else EXIT_DOES_NOT_RESUME
    return _Answer(text.resume(found), lambda: text.resume_data(found), status)

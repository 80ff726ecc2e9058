"""What commands share: options from flags and files, an answer, an exit status."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.cli.examples import epilog
from wsm_megatron.config import JOB
from wsm_megatron.errors import EXIT_FAILED, UsageError, exit_code, is_internal, is_told
from wsm_megatron.options import (
    COUNT,
    PATH,
    Given,
    Option,
    Options,
    add_flags,
    given_flags,
    option,
    read_yaml,
)
from wsm_megatron.process.streams import say, show
from wsm_megatron.process.timeouts import timeouts


@dataclass(frozen=True, kw_only=True)
class LocalLaunch(Options):
    """How the command starts its ranks, where no launcher does."""

    local_ranks: int | None = option(
        "start N ranks on this machine, without torchrun or srun: one for each GPU, or for every "
        "16 cores",
        COUNT,
        None,
        default_text="this process alone",
        group=JOB,
    )


@dataclass(frozen=True, kw_only=True)
class _File(Options):
    config: Path | None = option(
        "YAML file of the options below (last: 8, decay: 1-sqrt); flags win over it",
        PATH,
        None,
        metavar="FILE",
    )


@dataclass(frozen=True)
class Answer:
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


Command = Callable[[argparse.Namespace], "Answer"]


def run_command(arguments: argparse.Namespace, run: Command) -> int:
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


def add(commands: Any, name: str, run: Command, help: str, of: str = "") -> argparse.ArgumentParser:
    """Add a command, or a kind ``of`` a command."""
    command = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog(f"{of} {name}".strip()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="last line of output: a JSON object")
    command.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    command.set_defaults(run=run)
    return command


def add_job(commands: Any, name: str, run: Command, help: str, options: Sequence[Option]) -> None:
    command = add(commands, name, run, help)
    add_flags(command, _File.options())
    for title in dict.fromkeys(one.group for one in options):
        group = command.add_argument_group(title)
        add_flags(group, [one for one in options if one.group == title])


def given_options(arguments: argparse.Namespace, options: Sequence[Option]) -> Given:
    """Options from flags and the file of ``--config``, read once, before any rank is started.

    Raises ``UsageError`` where required ones are missing.
    """
    file = _File(**given_flags(arguments, _File.options()).values).config
    given = given_flags(arguments, options)
    if file is not None:
        given = read_yaml(file, options, "--config") | given
    missing = [one.flag for one in options if one.required and one.name not in given.values]
    if not {"load", "source"} & given.values.keys():
        missing.insert(0, "--load")
    if missing:
        raise UsageError(f"give {' and '.join(missing)}, as flags or in the file of --config")
    return given

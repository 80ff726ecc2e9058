"""``wsm``: the commands, each in a module that is imported when it is asked for.

So the list of commands and what needs no torch are there at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from wsm_megatron.cli.command import run_command
from wsm_megatron.errors import StoppedError
from wsm_megatron.version import __version__

COMMANDS = {
    "merge": "merge checkpoints of a run into one",
    "plan": "say everything that merge would do; write nothing",
    "sweep": "make every merge of a grid of windows, decays and orders, of one read",
    "select": "rank merges and checkpoints by their scores",
    "search": "search the coefficients of a window that score best",
    "rescue": "merge the checkpoints before a spike, and say how to resume from there",
    "report": "one page of a sweep: scores, coefficients, the run, its path",
    "plot": "pictures of coefficients, a run, a sweep, a trajectory",
    "list": "the merges below a folder, of what and how they scored",
    "coefficients": "coefficients of a decay",
    "export": "write a checkpoint's weights for others",
    "inspect": "what is in a checkpoint or a run",
    "verify": "check a checkpoint on disk, every byte",
    "resume-check": "say whether and how Megatron resumes",
}
_MODULES = {"plan": "merge"}
"""Where a command is not in the module of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``wsm``; returns the exit status."""
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_Log()]
    )
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    given = _with_negative_values(sys.argv[1:] if argv is None else argv)
    arguments = parser(given).parse_args(given)
    logging.getLogger("wsm_megatron").setLevel(
        logging.INFO if arguments.verbose else logging.WARNING
    )
    return run_command(arguments, arguments.run)


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line; of commands that are not on it it knows no flags."""
    made = argparse.ArgumentParser(
        prog="wsm", description="Merge Megatron checkpoints: the effect of LR decay, without it."
    )
    made.add_argument("--version", action="version", version=f"wsm_megatron {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        if name == command_of(argv):
            module = import_command(argv)
            getattr(module, f"add_{name.replace('-', '_')}")(commands, help)
        else:
            commands.add_parser(name, help=help)
    return made


def _complete() -> None:
    """Answer a shell that asks how the line goes on, and end the process."""
    import argcomplete  # which set the variable

    argcomplete.autocomplete(parser(os.environ["COMP_LINE"].split()))


def command_of(argv: Sequence[str]) -> str | None:
    """The command on a command line."""
    return next((one for one in argv if one in COMMANDS), None)


def import_command(argv: Sequence[str]) -> ModuleType | None:
    """The module of the command on a command line, imported with all that it needs."""
    name = command_of(argv)
    if name is None:
        return None
    return import_module(f"wsm_megatron.cli.{_MODULES.get(name, name).replace('-', '_')}")


class _Log(logging.StreamHandler):
    """Standard error. A signal that comes up while a line is written is none of its failures.

    What a command's report says too (a record with ``reported``) is not said twice.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not hasattr(record, "reported") and bool(super().filter(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, StoppedError):
            raise error
        super().handleError(record)


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

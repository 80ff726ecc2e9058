"""``wsm merge | plan | coefficients | inspect | verify | resume-check``: parse, build, call."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

from wsm_megatron import report
from wsm_megatron.checkpoint.patience import check_storage
from wsm_megatron.config import MergeConfig, flag
from wsm_megatron.distributed import job_ranks
from wsm_megatron.engine.inspect import inspect_checkpoint, inspect_run, is_checkpoint
from wsm_megatron.engine.merge import merge, prepare
from wsm_megatron.engine.resume import check_resume
from wsm_megatron.engine.selection import select_checkpoints
from wsm_megatron.engine.sources import Decay, decay_over
from wsm_megatron.engine.verify import verify
from wsm_megatron.errors import (
    EXIT_DOES_NOT_RESUME,
    EXIT_FAILED,
    MergeError,
    StoppedError,
    exit_code,
)
from wsm_megatron.local import run_forked
from wsm_megatron.progress import progress_bar
from wsm_megatron.signals import ENDING, ending_signals
from wsm_megatron.window import Checkpoint

logger = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a merge has to end by itself once storage hangs."""

_GROUPS = {"run": "run", "which": "which checkpoints", "how": "how they are merged", "job": "job"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``wsm``; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    logging.getLogger("wsm_megatron").setLevel(
        logging.INFO if arguments.verbose else logging.WARNING
    )
    return _status(arguments, arguments.run)


def _status(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], int | None]) -> int:
    """The exit status of a command, its error printed."""
    try:
        return run(arguments) or 0
    except (ValueError, MergeError) as error:
        print(f"wsm {arguments.command}: {error}", file=sys.stderr)
        return exit_code(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsm", description="Merge Megatron checkpoints: the effect of LR decay, without it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = _add_merge(commands, "merge", _merge, "merge checkpoints of a run into one")
    command.add_argument(
        "--local-ranks",
        type=int,
        metavar="N",
        help="start N ranks on this machine, without torchrun or srun: one for each GPU, or for "
        "every 16 cores (default: this process alone)",
    )
    _add_merge(commands, "plan", _plan, "say everything that merge would do; write nothing")
    _add_coefficients(commands)
    command = _add(commands, "inspect", _inspect, "what is in a checkpoint or a run")
    command.add_argument("directory", type=Path)
    command.add_argument("--entries", action="store_true", help="list every entry")
    command = _add(commands, "verify", _verify, "check a checkpoint on disk, every byte")
    command.add_argument("directory", type=Path)
    command.add_argument(
        "--sources", action="store_true", help="recompute samples from the sources, bit for bit"
    )
    command.add_argument("--allow-nonfinite", action="store_true", help="let NaN and Inf pass")
    command = _add(commands, "resume-check", _resume_check, "say whether and how Megatron resumes")
    command.add_argument("directory", type=Path, help="a checkpoint, or a root with a tracker")
    command.add_argument(
        "--against", type=Path, help="a run or checkpoint whose launch line is to resume from it"
    )
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.add_argument("--json", action="store_true", help="last line of output: a JSON object")
    command.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    command.set_defaults(run=run)
    return command


def _add_merge(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str
) -> argparse.ArgumentParser:
    command = _add(commands, name, run, help)
    groups = {key: command.add_argument_group(title) for key, title in _GROUPS.items()}
    for option in fields(MergeConfig):
        _add_option(groups[option.metadata["group"]], option)
    return command


def _add_option(parser: Any, option: Field) -> None:
    """One option of the config as a flag; its type follows the field's annotation."""
    more: dict[str, Any] = {"help": option.metadata["help"], "dest": option.name}
    required = option.default is MISSING
    if option.default is False:
        more["action"] = "store_true"
    elif option.default == ():
        more.update(action="append", metavar="PATTERN")
    else:
        kind = option.metadata.get("parse", str(option.type).removesuffix(" | None"))
        more["type"] = _TYPES[kind]
        more["choices"] = option.metadata.get("choices")
        more["metavar"] = option.metadata.get("metavar")
        if option.default not in (MISSING, None):
            more["help"] += f" (default: {option.default})"
    parser.add_argument(
        flag(option.name),
        default=argparse.SUPPRESS if not required else None,
        required=required,
        **more,
    )


def _add_coefficients(commands: Any) -> None:
    command = _add(commands, "coefficients", _coefficients, "coefficients of a decay")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--num", type=int, help="N checkpoints, evenly spaced")
    where.add_argument("--positions", type=_integers, help="positions: 1000,2000,4000")
    where.add_argument("--load", type=Path, help="a run directory")
    window = command.add_argument_group("which checkpoints of --load")
    how = command.add_argument_group("how")
    for option in fields(MergeConfig):
        if option.metadata["group"] == "which":
            _add_option(window, option)
        elif option.name in ("decay", "min_decay", "weights", "allow_unnormalized"):
            _add_option(how, option)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _bytes(text: str) -> int:
    """A size: 1000000, 256MiB, 2GB."""
    match = re.fullmatch(r"(\d+)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MiB")
    number, unit, binary = match.groups()
    return int(number) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0)


_TYPES: dict[str, Callable[[str], Any]] = {
    "Path": Path,
    "int": int,
    "float": float,
    "str": str,
    "tuple[int, ...]": _integers,
    "tuple[float, ...]": _floats,
    "bytes": _bytes,
}


def _config(arguments: argparse.Namespace, **more: Any) -> MergeConfig:
    given = {
        option.name: getattr(arguments, option.name)
        for option in fields(MergeConfig)
        if hasattr(arguments, option.name)
    }
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return MergeConfig(**{**given, **more})


def _merge(arguments: argparse.Namespace) -> int | None:
    if arguments.local_ranks is not None:
        return run_forked(arguments.local_ranks, lambda: _status(arguments, _merge_on_rank))
    _merge_on_rank(arguments)
    return None


def _merge_on_rank(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    with ending_signals(_stop), _exit_when_storage_hangs(), job_ranks() as ranks:
        done = merge(config, progress_bar)
        if ranks.rank != 0:
            return
    for line in report.merged(done):
        print(line)
    if arguments.json:
        _print_json(done.as_data())


def _stop(number: int, _: object) -> None:
    """A signal ends what runs as an error does, the first time."""
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)
    name = signal.Signals(number).name
    raise StoppedError(f"stopped by {name}; nothing was published", number)


@contextmanager
def _exit_when_storage_hangs() -> Iterator[None]:
    """End the process where the block cannot: its own thread hangs in a read."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(GRACE):
            try:
                check_storage()
            except MergeError as error:
                if not over.wait(GRACE):  # where only a worker hangs, the merge ends by itself
                    _say_last(f"{error}; nothing was published")
                    os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _say_last(message: str) -> None:
    """Before the process ends without anything else."""
    logger.error(message, extra={"event": "failed", "fields": {"exit_code": EXIT_FAILED}})
    for handler in logging.getLogger("wsm_megatron").handlers:
        handler.flush()


def _plan(arguments: argparse.Namespace) -> None:
    with job_ranks() as ranks:
        job = prepare(_config(arguments), ranks)
        if ranks.rank != 0:
            return
    for line in report.planned(job):
        print(line)
    if arguments.json:
        _print_json(report.plan_data(job))


def _coefficients(arguments: argparse.Namespace) -> None:
    decay = _decay(arguments)
    for line in report.decay_table(decay):
        print(line)
    if arguments.json:
        of_run = report.unit_data(decay) if arguments.load is not None else {}
        _print_json({**report.decay_data(decay), **of_run})


def _decay(arguments: argparse.Namespace) -> Decay:
    root = arguments.load or Path("run")
    config = _config(arguments, load=root, save=root / "wsm")
    if arguments.load is None:
        if chosen := [
            f.name for f in fields(MergeConfig) if _is_window(f) and hasattr(arguments, f.name)
        ]:
            raise ValueError(f"{flag(chosen[0])} selects checkpoints of a run: give --load")
        checkpoints = _numbered(arguments)
    else:
        (checkpoints,) = select_checkpoints(root, config.windows[0], allow_lr_decay=True)
    if len(config.windows) * len(config.decays) > 1 or config.sliding_every is not None:
        raise ValueError("coefficients shows one decay over one window at a time")
    return decay_over(
        checkpoints, config.decay, config.min_decay, config.weights, config.allow_unnormalized
    )


def _is_window(option: Field) -> bool:
    return option.metadata["group"] == "which"


def _numbered(arguments: argparse.Namespace) -> tuple[Checkpoint, ...]:
    if arguments.num is not None and arguments.num < 2:
        raise ValueError(f"--num {arguments.num}: a merge needs at least two checkpoints")
    numbers = arguments.positions or tuple(range(1, arguments.num + 1))
    if list(numbers) != sorted(set(numbers)):
        raise ValueError("--positions must increase")
    return tuple(Checkpoint(number) for number in numbers)


def _inspect(arguments: argparse.Namespace) -> None:
    path = arguments.directory
    if is_checkpoint(path):
        contents = inspect_checkpoint(path)
        lines, data = (
            report.checkpoint(contents, arguments.entries),
            report.checkpoint_data(contents),
        )
    else:
        run = inspect_run(path)
        lines, data = report.run(run), report.run_data(run)
    for line in lines:
        print(line)
    if arguments.json:
        _print_json(data)


def _verify(arguments: argparse.Namespace) -> None:
    done = verify(
        arguments.directory,
        sources=arguments.sources,
        allow_nonfinite=arguments.allow_nonfinite,
    )
    for line in report.verified(done):
        print(line)
    if arguments.json:
        _print_json({**asdict(done), "path": str(done.path)})


def _resume_check(arguments: argparse.Namespace) -> int:
    found = check_resume(arguments.directory, arguments.against)
    for line in report.resume(found):
        print(line)
    if arguments.json:
        _print_json(report.resume_data(found))
    return 0 if found.resumes else EXIT_DOES_NOT_RESUME


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)

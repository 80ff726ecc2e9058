"""``wsm coefficients``: what a decay weighs. Needs no torch, but for ``--load``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.decay_table import (
    decay_data,
    decay_table,
    side_by_side,
    unit_data,
    unit_line,
)
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.options import add_flags, count, given_flags, local_path, several, typed
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.window_options import WindowOptions

_path, _count, _counts = typed(local_path), typed(count), typed(several(count))
_WINDOW = WindowOptions.options()
_WEIGHING = (
    "decay", "min_decay", "order", "order_seed", "weights", "allow_unnormalized", "normalize",
)  # fmt: skip
_COEFFICIENTS = [one for one in MergeConfig.options() if one.name in _WEIGHING]


def add_coefficients(commands: Any, help: str) -> None:
    """Add the command."""
    add_choice(add(commands, "coefficients", _coefficients, help))


def add_choice(command: argparse.ArgumentParser) -> None:
    """Flags that say of which checkpoints, and how they are weighed."""
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--num", type=_count, help="N checkpoints, evenly spaced")
    where.add_argument("--positions", type=_counts, help="positions: 1000,2000,4000")
    where.add_argument("--load", type=_path, help="a run directory")
    add_flags(command.add_argument_group("which checkpoints of --load"), _WINDOW)
    add_flags(command.add_argument_group("how"), _COEFFICIENTS)


def _coefficients(arguments: argparse.Namespace) -> Answer:
    decays = chosen_decays(arguments)
    if len(decays) == 1:
        (decay,) = decays
        lines, data = decay_table(decay), decay_data(decay)
    else:
        lines = side_by_side(decays)
        data = {"decays": {str(one.decay): decay_data(one) for one in decays}}
    if arguments.load is None:
        return Answer(lines, lambda: data, shown=True)
    of_run = unit_data(decays[0])
    return Answer(chain(lines, [unit_line(decays[0])]), lambda: {**data, **of_run}, shown=True)


def chosen_decays(arguments: argparse.Namespace) -> list[MergeCoefficients]:
    """One for each decay that the flags name, of the same checkpoints."""
    root = arguments.load or Path("run")
    given = given_flags(arguments, [*_WINDOW, *_COEFFICIENTS]).values
    config = MergeConfig(load=root, save=root / "wsm", **given)
    if len(config.windows) > 1 or config.sliding_every is not None:
        raise UsageError("coefficients shows one window at a time")
    if arguments.load is not None:
        checkpoints = _of_run(root, config)
    elif chosen := [one.flag for one in _WINDOW if one.name in given]:
        raise UsageError(f"{chosen[0]} selects checkpoints of a run: give --load")
    else:
        checkpoints = _numbered(arguments)
    return [replace(config, decay=decay).weigh(checkpoints) for decay in config.decays]


def _of_run(root: Path, config: MergeConfig) -> tuple[Checkpoint, ...]:
    from wsm_megatron.planning.selection import select_checkpoints  # reads checkpoints, with torch

    (checkpoints,) = select_checkpoints(root, config.windows[0], allow_lr_decay=True)
    return checkpoints


def _numbered(arguments: argparse.Namespace) -> tuple[Checkpoint, ...]:
    if arguments.num is not None and arguments.num < 2:
        raise UsageError(f"--num {arguments.num}: a merge needs at least two checkpoints")
    numbers = arguments.positions or tuple(range(1, arguments.num + 1))
    if list(numbers) != sorted(set(numbers)):
        raise UsageError("--positions must increase")
    return tuple(Checkpoint(number) for number in numbers)

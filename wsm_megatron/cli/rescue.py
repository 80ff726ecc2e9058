"""``wsm rescue``: the merge before a spike, and the flags that resume from it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from wsm_megatron.api import merge
from wsm_megatron.cli.command import Answer, LocalLaunch, add_job, given_options
from wsm_megatron.cli.merge import merged
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.cli.trajectory_text import observed
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import RUN, ExecutionOptions, MergeConfig
from wsm_megatron.options import COUNT, Options, option
from wsm_megatron.planning.rescue import LAST, before_spike, skip_flag

_OWN: dict[str, Any] = {"last": LAST, "decay": "mean", "optimizer_state": "last"}
"""Options of a merge that have another default here."""
_NOT_HERE = (
    "source", "iterations", "from_", "to", "window_iterations", "window_tokens", "sliding_every",
    "min_checkpoints", "order", "order_seed", "output_iteration",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rescue(Options):
    """Where the run went wrong."""

    before: int = option(
        "the iteration at which the loss spiked: only checkpoints before it are merged",
        COUNT,
        group=RUN,
        metavar="ITER",
        least=1,
    )


_MERGE = tuple(
    replace(one, default=_OWN.get(one.name, one.default))
    for one in MergeConfig.options()
    if one.name not in _NOT_HERE
)
RESCUE_OPTIONS = (
    *(one for one in _MERGE if one.group == RUN),
    *Rescue.options(),
    *(one for one in _MERGE if one.group != RUN),
    *(one for one in ExecutionOptions.options() if one.name not in ("trajectory", "node_local")),
    *LocalLaunch.options(),
)
"""What ``--config`` may set."""


def add_rescue(commands: Any, help: str) -> None:
    """Add the command."""
    add_job(commands, "rescue", _rescue, help, RESCUE_OPTIONS)


def _rescue(arguments: argparse.Namespace) -> Answer:
    given = given_options(arguments, RESCUE_OPTIONS)
    before = Rescue(**given.of(Rescue)).before
    own = {name: v for name, v in _OWN.items() if name != "decay" or "weights" not in given.values}
    config = before_spike(MergeConfig(**own | given.of(MergeConfig)), before)
    execution = ExecutionOptions(**given.of(ExecutionOptions), trajectory=True)

    def on_rank(ranks: Ranks) -> Answer:
        done = merge(config, execution, progress_bar)
        if ranks.rank != 0:
            return Answer()
        path = observed(execution, done.trajectory, config.save, verbose=arguments.verbose)
        lines = chain(path, merged(done, verbose=arguments.verbose))
        skipped = skip_flag(done.iterations[-1], before)
        return Answer(
            chain(lines, _skips(*skipped, before)),
            lambda: done.as_data() | {"before": before, "skip": list(skipped)},
        )

    return on_ranks(arguments, LocalLaunch(**given.of(LocalLaunch)), on_rank)


def _skips(older: str, newer: str, before: int) -> Iterator[str]:
    yield (
        f"to pass over the batch of iteration {before}, where that is to blame: {newer} "
        f"({older} up to core 0.16); further iterations behind it"
    )

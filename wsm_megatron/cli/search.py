"""``wsm search``: coefficients that score best, and how far the named decays are from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, LocalLaunch, add_job, given_options
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import RUN, ExecutionOptions, MergeConfig
from wsm_megatron.sweeps.metric import LOSS_ALONE
from wsm_megatron.sweeps.search import (
    NAME,
    REPORT,
    SEARCH,
    Evaluation,
    SearchOptions,
    SearchReport,
)
from wsm_megatron.sweeps.search_run import search_on_disk

_NOT_SEARCHED = (
    "source", "sliding_every", "decay", "min_decay", "order", "order_seed", "weights",
    "allow_unnormalized", "normalize", "optimizer_state", "rebuild_main_params",
    "output_iteration",
)  # fmt: skip
_MERGE = [one for one in MergeConfig.options() if one.name not in _NOT_SEARCHED]

SEARCH_OPTIONS = (
    *(one for one in _MERGE if one.group == RUN),
    *SearchOptions.options(),
    *(one for one in _MERGE if one.group != RUN),
    *(one for one in ExecutionOptions.options() if one.name != "trajectory"),
    *LocalLaunch.options(),
)
"""What ``--config`` may set."""


def add_search(commands: Any, help: str) -> None:
    """Add the command."""
    add_job(commands, "search", _search, help, SEARCH_OPTIONS)


def _search(arguments: argparse.Namespace) -> Answer:
    given = given_options(arguments, SEARCH_OPTIONS)
    names = {one.name for one in _MERGE}
    config = MergeConfig(**{name: v for name, v in given.values.items() if name in names})
    options = SearchOptions(**given.of(SearchOptions))
    execution = ExecutionOptions(**given.of(ExecutionOptions))

    def on_rank(ranks: Ranks) -> Answer:
        if ranks.rank == 0:
            given.tell_renamed()
        done = search_on_disk(config, options, execution, progress_bar)
        if done is None:
            return Answer()
        found, best = done
        return Answer(searched(found, best), lambda: search_data(found, best))

    return on_ranks(arguments, LocalLaunch(**given.of(LocalLaunch)), on_rank)


def searched(found: SearchReport, best: Path) -> Iterator[str]:
    """Best coefficients, and a table of the named decays behind them."""
    first, last = found.iterations[0], found.iterations[-1]
    yield (
        f"{len(found.evaluations)} evaluations over {len(found.iterations)} checkpoints, "
        f"{first}-{last}; {found.remembered} of them remembered"
    )
    yield f"{found.metric.name}: {found.metric.way}"
    yield from _table(found)
    yield f"{'iteration':>16}  {'best coefficient':>16}"
    for iteration, coefficient in zip(found.iterations, found.best.coefficients, strict=True):
        yield f"{iteration:>16}  {coefficient:>16.6f}"
    steps = [f"{n}: {one.scores[found.metric.name]:.6g}" for n, one in found.frontier]
    yield f"best after so many evaluations: {', '.join(steps)}"
    yield f"best merge: {best}"
    yield f"all evaluations: {best.parents[1] / NAME}"
    if found.best.report is None:
        yield (
            "note: these scores are of the split that was searched on, and too good by what was "
            "fitted to it; --report CMD scores another one"
        )
    if found.metric.is_loss:
        yield f"note: {LOSS_ALONE}"


def search_data(found: SearchReport, best: Path) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "metric": {"name": found.metric.name, "lower_is_better": found.metric.lower},
        "iterations": list(found.iterations),
        "best": {"path": str(best), **_data(found, found.best)},
        "named": [_data(found, one) for one in found.named],
        "frontier": [
            {"evaluations": n, "score": one.scores[found.metric.name]} for n, one in found.frontier
        ],
        "evaluations": len(found.evaluations),
        "remembered": found.remembered,
        "manifest": str(best.parents[1] / NAME),
    }


def _table(found: SearchReport) -> Iterator[str]:
    """Of both splits: the score, and how far behind the best it is."""
    reported = found.best.report is not None
    name = found.metric.name
    yield f"{'weights':16}{name:>14}{'behind':>12}" + (
        f"{name + ' (report)':>20}{'behind':>12}" if reported else ""
    )
    rows = [(found.best.name or "searched", found.best)]
    rows += [(one.name or "", one) for one in found.named if one is not found.best]
    for label, one in rows:
        line = f"{label:16.16}{one.scores[name]:>14.6g}{found.behind(one, SEARCH):>12.3g}"
        if reported and one.report is not None:
            line += f"{one.report[name]:>20.6g}{found.behind(one, REPORT):>12.3g}"
        yield line


def _data(found: SearchReport, one: Evaluation) -> dict[str, Any]:
    return {
        "name": one.name,
        "coefficients": list(one.coefficients),
        "scores": one.scores,
        "report": one.report,
        "behind": found.behind(one, SEARCH),
        "behind_on_report": found.behind(one, REPORT),
    }

"""``wsm select``: what the scores of a sweep, and of checkpoints, say."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.merge_command import merge_command
from wsm_megatron.cli.reporting import add_report_flag, report_of_sweep
from wsm_megatron.errors import UsageError, some
from wsm_megatron.options import count, local_path, typed
from wsm_megatron.sweeps.metric import LOSS_ALONE, Metric, metrics_of
from wsm_megatron.sweeps.selection import Scored, Selection, select_merges

_SHOWN = 10


def add_select(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "select", _select, help)
    path = typed(local_path)
    command.add_argument(
        "--manifest",
        type=path,
        metavar="OUT/sweep.json",
        help="merges, as wsm sweep lists them",
    )
    command.add_argument(
        "--load", type=path, metavar="RUN", help="a run directory whose checkpoints are scored"
    )
    command.add_argument(
        "--scores",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help="CSV or JSON of any harness: merge or checkpoint, and metrics (repeatable; default: "
        "scores that wsm sweep --eval has made)",
    )
    command.add_argument(
        "--metric",
        default="loss",
        metavar="NAME",
        help="what is compared; two, separated by a comma, give a Pareto front; NAME:min or "
        "NAME:max say which way is better (default: loss)",
    )
    command.add_argument(
        "--top",
        type=typed(count),
        default=32,
        metavar="N",
        help="how many of the best checkpoints make a list of sources (default: 32)",
    )
    add_report_flag(command)


def _select(arguments: argparse.Namespace) -> Answer:
    if arguments.top < 2:
        raise UsageError(f"--top {arguments.top}: a merge needs at least two checkpoints")
    found = select_merges(
        metrics_of(arguments.metric),
        arguments.scores,
        arguments.manifest,
        arguments.load,
        arguments.top,
    )
    lines, page = selected(found), arguments.report
    if page is not None:
        if arguments.manifest is None:
            raise UsageError("--report is of a sweep: give --manifest OUT/sweep.json")
        report_of_sweep(arguments.manifest, found, arguments.load, None).write(page)
        lines = chain(lines, [f"report: {page}"])
    return Answer(lines, lambda: selected_data(found), shown=True)


def selected(found: Selection) -> Iterator[str]:
    """A table of the best, and commands that go on from there."""
    for metric in found.metrics:
        yield f"{metric.name}: {metric.way}"
    if found.merges:
        yield from _table("merge", found.merges, found.metrics)
        best = found.merges[0].candidate.merge
        assert best is not None
        yield f"best merge: {best.path}{'' if best.exists else ' (not on disk)'}"
        if best.export is not None:
            yield f"  exported: {best.export}"
        yield f"  {merge_command(best)}"
    if found.front:
        yield f"Pareto front of {' and '.join(metric.name for metric in found.metrics)}:"
        yield from _table("merge", found.front, found.metrics, len(found.front))
    if found.checkpoints:
        yield from _table("checkpoint", found.checkpoints, found.metrics)
        yield f"the {len(found.top)} best checkpoints, as sources of a merge:"
        yield f"  --iterations {','.join(map(str, found.top))}"
    if found.missing:
        yield f"without scores: {some(found.missing, 5)}"
    if _loss_alone(found):
        yield f"note: {LOSS_ALONE}"


def selected_data(found: Selection) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "metrics": [{"name": m.name, "lower_is_better": m.lower} for m in found.metrics],
        "merges": [_data(one) for one in found.merges],
        "best": _data(found.merges[0]) if found.merges else None,
        "pareto": [_data(one) for one in found.front],
        "checkpoints": [_data(one) for one in found.checkpoints],
        "top": list(found.top),
        "iterations": ",".join(map(str, found.top)),
        "missing": list(found.missing),
        "note": LOSS_ALONE if _loss_alone(found) else None,
    }


def _loss_alone(found: Selection) -> bool:
    return bool(found.merges) and all(metric.is_loss for metric in found.metrics)


def _table(
    what: str, scored: Sequence[Scored], metrics: Sequence[Metric], most: int = _SHOWN
) -> Iterator[str]:
    width = max(len(what), *(len(one.candidate.name) for one in scored[:most]))
    yield f"{'rank':>4}  {what:{width}}{''.join(f'{m.name:>14}' for m in metrics)}"
    for rank, one in enumerate(scored[:most], 1):
        values = "".join(f"{one.scores[m.name]:>14.6g}" for m in metrics)
        yield f"{rank:>4}  {one.candidate.name:{width}}{values}"
    if len(scored) > most:
        yield f"      and {len(scored) - most} more (--json has all)"


def _data(one: Scored) -> dict[str, Any]:
    candidate, merge = one.candidate, one.candidate.merge
    data: dict[str, Any] = {
        "path": candidate.path,
        "iteration": candidate.iteration,
        "scores": dict(one.scores),
    }
    if merge is not None:
        data |= {
            "name": merge.name,
            "iterations": list(merge.iterations),
            "coefficients": list(merge.coefficients),
            "decay": merge.decay,
            "order": merge.order,
            "exists": merge.exists,
            "export": merge.export,
            "command": merge_command(merge),
        }
    return data

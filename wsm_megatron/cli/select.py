"""``wsm select``: what the scores of a sweep, and of checkpoints, say."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.errors import UsageError, some
from wsm_megatron.options import count, local_path, typed
from wsm_megatron.schedule.order import SCRAMBLED, SEQUENTIAL
from wsm_megatron.sweeps.manifest import SweptMerge
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
    return Answer(selected(found), lambda: selected_data(found), shown=True)


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


def merge_command(one: SweptMerge) -> str:
    """The command that makes a merge of a sweep alone."""
    sources = [Path(path) for path in one.sources]
    words = ["wsm", "merge"]
    if {path.parent for path in sources} == {sources[0].parent}:
        iterations = ",".join(map(str, one.iterations))
        words += ["--load", str(sources[0].parent), "--iterations", iterations]
    else:
        words += [word for path in sources for word in ("--source", str(path))]
    words += ["--save", "OUT"]
    if one.decay is None:
        return shlex.join([*words, "--weights", ",".join(map(repr, one.coefficients))])
    words += ["--decay", one.decay]
    if one.min_decay:
        words += ["--min-decay", repr(one.min_decay)]
    if one.order != SEQUENTIAL:
        words += ["--order", one.order]
    if one.order == SCRAMBLED and one.order_seed:
        words += ["--order-seed", str(one.order_seed)]
    return shlex.join(words)


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

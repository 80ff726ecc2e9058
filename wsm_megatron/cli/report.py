"""``wsm report``: one page of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.reporting import common_run, own_selection, report_of_sweep
from wsm_megatron.errors import UsageError
from wsm_megatron.options import local_path, typed
from wsm_megatron.sweeps.metric import metrics_of
from wsm_megatron.sweeps.selection import Selection, select_merges


def add_report(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "report", _report, help)
    path = typed(local_path)
    command.add_argument("--manifest", type=path, required=True, metavar="OUT/sweep.json")
    command.add_argument(
        "--scores", type=path, action="append", default=[], metavar="FILE",
        help="scores, as for wsm select (default: those that the sweep has made)",
    )  # fmt: skip
    command.add_argument(
        "--metric", metavar="NAME", help="as for wsm select (default: loss, or the sweep's own)"
    )
    command.add_argument(
        "--load", type=path, metavar="RUN", help="where the run is (default: where it was)"
    )
    command.add_argument(
        "--trajectory", type=path, metavar="FILE",
        help="a trajectory.json (default: the one beside the manifest)",
    )  # fmt: skip
    command.add_argument(
        "--out", type=path, default=Path("report.html"), metavar="FILE.html",
        help="(default: report.html)",
    )  # fmt: skip


def _report(arguments: argparse.Namespace) -> Answer:
    manifest, scores = arguments.manifest, arguments.scores
    if not manifest.is_file():
        raise UsageError(f"--manifest {manifest}: no such file")
    selection: Selection | None
    if scores:
        metrics = metrics_of(arguments.metric or "loss")
        selection = select_merges(metrics, scores, manifest, arguments.load or common_run(manifest))
    else:
        selection = own_selection(manifest, arguments.metric)
    report = report_of_sweep(manifest, selection, arguments.load, arguments.trajectory)
    report.write(arguments.out)
    return Answer([f"report: {arguments.out}"], lambda: {"report": str(arguments.out)})

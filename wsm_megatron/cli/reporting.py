"""The page of ``wsm report``, and of ``--report`` of other commands."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from wsm_megatron.cli.merge_command import merge_command
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.inspection.inspect import RunContents, inspect_run
from wsm_megatron.inspection.trajectory import NAME as TRAJECTORY
from wsm_megatron.inspection.trajectory import read_trajectory
from wsm_megatron.options import local_path, typed
from wsm_megatron.pictures.report import Report
from wsm_megatron.sweeps.manifest import SweepManifest, SweptMerge
from wsm_megatron.sweeps.metric import metrics_of
from wsm_megatron.sweeps.selection import Selection, select_merges
from wsm_megatron.trajectory.record import Trajectory

logger = logging.getLogger(__name__)


def add_report_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--report",
        type=typed(local_path),
        metavar="FILE.html",
        help="also write one page for people: pictures, tables, provenance",
    )


def report_of_sweep(
    manifest: Path, selection: Selection | None, run: Path | None, trajectory: Path | None
) -> Report:
    """What is known of a sweep: its run where that is still there, its trajectory where one was
    written beside it."""
    merges = SweepManifest.read(manifest).merges
    if not merges:
        raise UsageError(f"{manifest} lists no merge")
    best = _best(selection)
    found = run or common_run(manifest)
    return Report(
        title=f"Merges of {found or manifest.parent}",
        merges=merges,
        selection=selection,
        command=None if best is None else merge_command(best),
        run=None if found is None else _inspected(found),
        trajectory=_trajectory(trajectory, manifest.parent / TRAJECTORY),
    )


def own_selection(manifest: Path, metric: str | None) -> Selection | None:
    """A sweep's own scores, ranked; None where it has none.

    Args:
        metric: as ``--metric`` has it; by default the first that it has.
    """
    merges = SweepManifest.read(manifest).merges
    names = [name for one in merges for name in one.scores or ()]
    if not names:
        return None
    return select_merges(metrics_of(metric or names[0]), [], manifest)


def _best(selection: Selection | None) -> SweptMerge | None:
    if selection is None or not selection.merges:
        return None
    return selection.merges[0].candidate.merge


def common_run(manifest: Path) -> Path | None:
    """The run that all merges of a sweep are of, where there is one and it is still there."""
    merges = SweepManifest.read(manifest).merges
    roots = {Path(source).parent for one in merges for source in one.sources}
    return next((root for root in roots if len(roots) == 1 and root.is_dir()), None)


def _inspected(run: Path) -> RunContents | None:
    try:
        return inspect_run(run)
    except (UsageError, MergeError) as error:
        logger.warning("no picture of the run: %s", error)
        return None


def _trajectory(given: Path | None, beside: Path) -> Trajectory | None:
    if given is not None:
        return read_trajectory(given)
    return read_trajectory(beside) if beside.is_file() else None

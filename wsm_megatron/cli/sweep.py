"""``wsm sweep``: options of a grid, and one line for every merge."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from wsm_megatron.cli.command import Answer, LocalLaunch, add_job, given_options
from wsm_megatron.cli.figures import size
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.cli.reporting import own_selection, report_of_sweep
from wsm_megatron.cli.trajectory_text import observed
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import RUN, ExecutionOptions, MergeConfig
from wsm_megatron.export.options import MergeExport
from wsm_megatron.process.streams import say
from wsm_megatron.sweeps.estimate import SweepEstimate
from wsm_megatron.sweeps.grid import SHARED, Sweep, SweepGrid
from wsm_megatron.sweeps.manifest import SweptMerge
from wsm_megatron.sweeps.run import SweepOptions, SweepReport, sweep

SWEEP_OPTIONS = (
    *(one for one in SHARED if one.group == RUN),
    *SweepGrid.options(),
    *SweepOptions.options(),
    *(one for one in SHARED if one.group != RUN),
    *MergeExport.options(),
    *ExecutionOptions.options(),
    *LocalLaunch.options(),
)
"""What ``--config`` may set."""


def add_sweep(commands: Any, help: str) -> None:
    """Add the command."""
    add_job(commands, "sweep", _sweep, help, SWEEP_OPTIONS)


def _sweep(arguments: argparse.Namespace) -> Answer:
    given = given_options(arguments, SWEEP_OPTIONS)
    shared = {name: value for name, value in given.values.items() if name in _SHARED_NAMES}
    wanted = Sweep(MergeConfig(**shared), SweepGrid(**given.of(SweepGrid)))
    execution = ExecutionOptions(**given.of(ExecutionOptions))
    options = SweepOptions(**given.of(SweepOptions))
    exports = MergeExport(**given.of(MergeExport))

    def on_rank(ranks: Ranks) -> Answer:
        if ranks.rank == 0:
            given.tell_renamed()
        done = sweep(wanted, execution, options, progress_bar, _tell, exports)
        if done is None:
            return Answer()
        dry = options.dry_run
        path = observed(execution, done.trajectory, wanted.base.save, verbose=arguments.verbose)
        lines = chain(swept(done, options), () if dry else path)
        if options.report is not None and not dry:
            selection = own_selection(done.manifest, options.metric if options.eval else None)
            report_of_sweep(done.manifest, selection, None, None).write(options.report)
            lines = chain(lines, [f"report: {options.report}"])
        return Answer(lines, lambda: swept_data(done), shown=dry)

    return on_ranks(arguments, LocalLaunch(**given.of(LocalLaunch)), on_rank)


_SHARED_NAMES = {one.name for one in SHARED}


def _tell(estimate: SweepEstimate) -> None:
    for line in estimated(estimate):
        say(line)


def estimated(estimate: SweepEstimate) -> Iterator[str]:
    """What a sweep will move, before it does."""
    yield (
        f"{estimate.merges} merges of {estimate.sources} sources: reads {size(estimate.read)}, "
        f"writes {size(estimate.written)}; {size(estimate.stored)} on disk at once, "
        f"{size(estimate.free)} free"
    )
    if estimate.seconds is None:
        yield "too little to measure rates by: it takes seconds"
        return
    assert estimate.read_rate is not None and estimate.write_rate is not None
    yield (
        f"about {estimate.seconds:.0f} s on one rank, by rates measured here: "
        f"{size(estimate.read_rate)}/s read, {size(estimate.write_rate)}/s written and synced"
    )


def swept(done: SweepReport, options: SweepOptions) -> Iterator[str]:
    """A line for every merge, and what was moved."""
    yield from _table(done.merges)
    if options.dry_run:
        yield "nothing was written"
        return
    yield (
        f"read {size(done.bytes_read)}, wrote {size(done.bytes_written)} in {done.seconds:.2f} s; "
        f"{sum(one.on_disk for one in done.merges)} of {len(done.merges)} merges are on disk"
    )
    yield f"manifest: {done.manifest}"


def swept_data(done: SweepReport) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "manifest": str(done.manifest),
        "merges": [one.as_data() for one in done.merges],
        "estimate": {**asdict(done.estimate), "seconds": done.estimate.seconds},
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": done.seconds,
        **({} if done.trajectory is None else {"trajectory": done.trajectory.summary()}),
    }


def _table(merges: Sequence[SweptMerge]) -> Iterator[str]:
    metrics = list(dict.fromkeys(name for one in merges for name in one.scores or ()))
    width = max(len(one.name) for one in merges)
    heads = "".join(f"{name:>12}" for name in metrics)
    yield f"{'merge':{width}}  {'sources':>7}  {'iterations':>19}  {'newest weighs':>13}{heads}"
    for one in merges:
        scores = "".join(f"{_number((one.scores or {}).get(name)):>12}" for name in metrics)
        where = f"{one.iterations[0]}-{one.iterations[-1]}"
        line = f"{one.name:{width}}  {len(one.iterations):>7}  {where:>19}"
        there = "" if one.on_disk else "  (not on disk)"
        yield f"{line}  {one.coefficients[-1]:>13.6f}{scores}{there}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"

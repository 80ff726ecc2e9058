"""``wsm merge`` and ``wsm plan``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from statistics import mean
from typing import Any

from wsm_megatron.access.protocol import Estimate
from wsm_megatron.api import merge_and_export, plan, trajectory
from wsm_megatron.cli.command import Answer, LocalLaunch, add_job, given_options
from wsm_megatron.cli.decay_table import decay_data, source_table, unit_data
from wsm_megatron.cli.export import exported
from wsm_megatron.cli.figures import size
from wsm_megatron.cli.launches import launch_lines
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.cli.trajectory_text import observed, trajectory_lines
from wsm_megatron.cli.windows_text import window_lines
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.execution.result import MergeReport
from wsm_megatron.execution.timing import PHASES, RankReport
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.export.options import MergeExport
from wsm_megatron.export.plan import ExportPlan
from wsm_megatron.options import Given
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.tasks import Recipe
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.sweeps.windows import affordable

_RANKS_SHOWN = 16

JOB_OPTIONS = (
    *MergeConfig.options(),
    *MergeExport.options(),
    *ExecutionOptions.options(),
    *LocalLaunch.options(),
)
"""What ``--config`` may set."""


def add_merge(commands: Any, help: str) -> None:
    """Add ``merge``."""
    add_job(commands, "merge", _merge, help, JOB_OPTIONS)


def add_plan(commands: Any, help: str) -> None:
    """Add ``plan``."""
    planned = [one for one in JOB_OPTIONS if one not in LocalLaunch.options()]
    add_job(commands, "plan", _plan, help, planned)


@dataclass(frozen=True)
class _Job:
    """A merge, as flags and file say; both are read once, before any rank is started."""

    given: Given
    config: MergeConfig
    export: MergeExport
    execution: ExecutionOptions
    launch: LocalLaunch

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> _Job:
        given = given_options(arguments, JOB_OPTIONS)
        return cls(
            given,
            MergeConfig(**given.of(MergeConfig)),
            MergeExport(**given.of(MergeExport)),
            ExecutionOptions(**given.of(ExecutionOptions)),
            LocalLaunch(**given.of(LocalLaunch)),
        )


def _merge(arguments: argparse.Namespace) -> Answer:
    job = _Job.of(arguments)

    def on_rank(ranks: Ranks) -> Answer:
        if ranks.rank == 0:
            job.given.tell_renamed()
        done, exports = merge_and_export(job.config, job.export, job.execution, progress_bar)
        if ranks.rank != 0:
            return Answer()
        published = not job.export.export_only
        lines = chain(
            merged(done, verbose=arguments.verbose, published=published),
            observed(job.execution, done.trajectory, job.config.save, verbose=arguments.verbose),
            *map(exported, exports),
        )
        return Answer(
            lines,
            lambda: done.as_data() | {"exports": [one.as_data() for one in exports]},
        )

    return on_ranks(arguments, job.launch, on_rank)


def _plan(arguments: argparse.Namespace) -> Answer:
    job = _Job.of(arguments)
    with job_ranks() as ranks:
        if ranks.rank == 0:
            job.given.tell_renamed()
        exports = MergedExports(job.export, job.config.save)
        planned, path = plan(job.config, job.execution, exports), None
        if job.execution.trajectory:
            reading = partial(progress_bar, doing="reading")
            path = trajectory(MergeSet.of(job.config), job.execution, reading)
    if planned is None:
        return Answer()
    found, moved = planned
    windows = None
    if job.config.load is not None and not job.execution.node_local:
        windows = affordable(found)
    lines = chain(
        would_do(found, moved, verbose=arguments.verbose, published=not job.export.export_only),
        *starmap(would_export, exports.planned()),
        () if windows is None else window_lines(windows),
        () if path is None else trajectory_lines(path, verbose=arguments.verbose),
    )
    more = {} if windows is None else {"windows": windows.as_data()}
    more |= {} if path is None else {"trajectory": path.summary()}
    return Answer(lines, lambda: plan_data(found, moved) | more, shown=True)


def merged(done: MergeReport, *, verbose: bool = True, published: bool = True) -> Iterator[str]:
    """One line for each of several merges; of a single one, what each checkpoint weighs.

    Args:
        verbose: tables for all of them, and where the time of each rank went.
        published: as checkpoints, not only as exports.
    """
    if not any(one.made for one in done.merged) and not verbose:
        if published:
            yield _nothing_to_do([one.output for one in done.merged])
        return
    moved = done.bytes_read + done.bytes_written
    for one in done.merged:
        if verbose or len(done.merged) == 1:
            yield from source_table(one.iterations, one.decay)
    yield (
        f"read {size(done.bytes_read)}, wrote {size(done.bytes_written)} in {done.seconds:.2f} s, "
        f"{size(moved / max(done.seconds, 1e-9))}/s"
    )
    if verbose:
        yield from _rank_lines(done.ranks)
    if not published:
        return
    for one in done.merged:
        what = "merged checkpoint" if one.made else "there already"
        yield f"{what}: {one.output} ({_sources(one.iterations, one.decay)})"
    yield f"main params {done.resume['main_params']}, moments {done.resume['moments']}"
    yield from launch_lines(done.resume["launch"], str(done.output.parent))


def _nothing_to_do(outputs: Sequence[Path]) -> str:
    if len(outputs) == 1:
        return f"nothing to do: {outputs[0]} holds this very merge already"
    return f"nothing to do: these {len(outputs)} merges are there already, last {outputs[-1]}"


def _sources(iterations: Sequence[int], decay: MergeCoefficients) -> str:
    name = "weights given" if decay.decay is None else decay.decay
    return f"{len(iterations)} checkpoints, {iterations[0]} to {iterations[-1]}, {name}"


def would_export(target: Path, plan: ExportPlan) -> Iterator[str]:
    family = "Megatron's names" if plan.record["family"] is None else plan.record["family"]
    yield f"would export {target} ({family}, {size(plan.nbytes)} in {len(plan.shards)} files)"


def would_do(
    job: Job, moved: Estimate, *, verbose: bool = True, published: bool = True
) -> Iterator[str]:
    """What is written, of what; entries by what becomes of them, one by one with ``verbose``.

    Args:
        published: as checkpoints, not only as exports.
    """
    for output in job.outputs:
        name = _sources(job.iterations(output), output.decay)
        if published:
            yield f"would write {output.path} ({name})"
        if verbose or len(job.outputs) == 1:
            yield from source_table(job.iterations(output), output.decay)
    newest = job.sources[job.outputs[0].newest]
    groups = _by_rule(job.plan.recipes)
    groups["copied as it is"] = [(key, "") for key in sorted(job.outputs[0].objects)]
    groups["copied beside"] = [(file.name, "") for file in newest.beside.copied]
    groups["left out"] = [(key, "") for key in job.plan.left_out]
    for rule, entries in groups.items():
        yield from _group(rule, entries, verbose)
    if job.execution.node_local:
        yield f"sums of {size(moved.sent)} would go from rank to rank"
    yield f"would read {size(moved.read)}, write {size(moved.written)}; nothing was written"


def _by_rule(recipes: Iterable[Recipe]) -> dict[str, list[tuple[str, str]]]:
    """Entries of the output, and their dtypes and shapes, by what becomes of them; model tensors
    first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for recipe in sorted(recipes, key=lambda recipe: (recipe.role.value, recipe.key)):
        for output in recipe.outputs:
            dtype = str(output.dtype).removeprefix("torch.")
            entry = output.key, f" {dtype} {list(output.shape)}"
            groups.setdefault(f"{recipe.role.value}: {recipe.what}", []).append(entry)
    return groups


def _group(rule: str, entries: Sequence[tuple[str, str]], verbose: bool) -> Iterator[str]:
    """A line of what is shown of it; one that is alone, or wanted, is shown whole."""
    if verbose or len(entries) == 1:
        yield from (f"  {rule:48} {key}{detail}" for key, detail in entries)
    elif entries:
        yield f"  {rule:48} {len(entries)} entries, {entries[0][0]} … (-v lists them)"


def plan_data(job: Job, moved: Estimate) -> dict[str, Any]:
    output = job.outputs[-1]
    return {
        "output": str(output.path),
        "outputs": [str(output.path) for output in job.outputs],
        "iterations": list(job.iterations(output)),
        **decay_data(output.decay),
        **unit_data(output.decay),
        "bytes_to_read": moved.read,
        "bytes_to_write": moved.written,
        "bytes_to_send": moved.sent,
        "tensors": {recipe.key: recipe.what for recipe in job.plan.recipes},
        "objects": list(output.objects),
        "left_out": list(job.plan.left_out),
        "side_files": [file.name for file in job.sources[output.newest].beside.copied],
    }


def _rank_lines(ranks: Sequence[RankReport]) -> Iterator[str]:
    """Where the time of each rank went; of many ranks, of the slowest ones and their mean."""
    shown = list(ranks)
    if len(shown) > _RANKS_SHOWN:
        yield f"the slowest {_RANKS_SHOWN} of {len(shown)} ranks, and the mean of all:"
        shown = sorted(shown, key=lambda one: one.seconds, reverse=True)[:_RANKS_SHOWN]
    phases = [name for name in PHASES if any(one.phases.get(name, 0.0) > 0.005 for one in ranks)]
    if shown:
        heads = [f"{name + ' s':>12}" for name in phases]
        yield f"{'rank':>5} {'host':16}{'read':>9}{'written':>9}{'speed':>11}{''.join(heads)}"
    for one in shown:
        yield _rank_line(f"{one.rank:>5} {one.host:16.16}", [one], phases)
    if len(ranks) > 1:
        yield _rank_line(f"{'mean':>5} {'':16}", ranks, phases)


def _rank_line(name: str, ranks: Sequence[RankReport], phases: Sequence[str]) -> str:
    """The mean of ranks, or one."""
    read = mean(one.bytes_read for one in ranks)
    written = mean(one.bytes_written for one in ranks)
    speed = f"{size(mean(one.bytes_per_second for one in ranks))}/s"
    seconds = [f"{mean(one.phases.get(phase, 0.0) for one in ranks):>12.2f}" for phase in phases]
    return f"{name}{size(read):>9}{size(written):>9}{speed:>11}{''.join(seconds)}"

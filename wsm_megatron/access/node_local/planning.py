"""Planning a merge whose ranks see different parts of the run, as on node-local storage.

Metadata that rank 0 does not see is read by a rank that does; rank 0 plans for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsm_megatron.access.node_local.assignment import Assigner
from wsm_megatron.access.node_local.inventory import JobInventory, take_inventory
from wsm_megatron.access.node_local.shares import Assignment
from wsm_megatron.checkpoint.common_state import UNKNOWN, CommonSummary, read_common, read_summary
from wsm_megatron.checkpoint.formats import CommonEntries
from wsm_megatron.checkpoint.run_directory import checkpoint_path, read_tracker
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.optimizer.flat_buckets import Contents, Search, contents, flat_buckets, search
from wsm_megatron.optimizer.flat_main_params import FlatMainParams, settle
from wsm_megatron.optimizer.precision import Kinds, args_of, kinds_of
from wsm_megatron.optimizer.representation import Representation
from wsm_megatron.planning.integers import checksums, compare_checksums, copied_integers
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.plan import check_whole
from wsm_megatron.planning.prepare import Wanted, all_of, plan_job
from wsm_megatron.planning.selection import Selector
from wsm_megatron.planning.sources import Source, open_source
from wsm_megatron.process.worker_threads import in_background


@dataclass(frozen=True)
class _Report:
    """What one rank tells of a source whose metadata it sees."""

    source: Source
    common: tuple[bytes | CommonEntries, str]
    flat: Search | None
    kinds: Kinds


def prepare_node_local(
    merges: MergeSet, execution: ExecutionOptions, ranks: Ranks
) -> tuple[Job, Assignment]:
    """:func:`.prepare_job` from what all ranks see together. Collective.

    Returns:
        the job, with the sources where this rank sees them, and who reads what.

    Raises:
        UsageError: the options do not fit the run. MergeError: a checkpoint is damaged, or no rank
            sees files that are needed.
    """
    config = merges.shared
    with ranks.together("looking at the sources"):
        seen = take_inventory(config.run), read_tracker(config.run)
    inventories, trackers = zip(*ranks.all_gather(seen), strict=True)
    view = JobInventory(config.run, inventories, trackers)
    wanted = _select(merges, view, ranks)
    with ranks.together("opening the sources"):
        iterations = [checkpoint.iteration for checkpoint in all_of(wanted)]
        reports = {
            i: _report(config, view, ranks.rank, i, i == iterations[-1])
            for i in iterations
            if view.reporter(i) == ranks.rank
        }
    told = {i: report for some in ranks.gather(reports) for i, report in some.items()}
    kinds = ranks.broadcast(lambda: told[iterations[-1]].kinds, "planning")
    flat = _flat_mains(config, view, reports, iterations, kinds.usual, ranks)

    def plan() -> tuple[Job, Assignment]:  # minutes for large runs, in which a rank may be lost
        return in_background(
            lambda: _plan(config, view, wanted, told, flat, kinds, ranks.size), ranks.check
        )

    job, assignment = ranks.broadcast(plan, "planning")
    sources = assignment.seen_from(ranks.rank, config.run, job.sources)
    here = replace(job.config, load=config.load)
    job = replace(job, config=here, execution=execution, sources=sources)
    if copied_integers(job):
        with ranks.together("comparing integer tensors"):
            own = checksums(job, ranks.rank)
        of_ranks = ranks.all_gather(own)
        ranks.broadcast(lambda: compare_checksums(job, of_ranks), "planning")
    return job, assignment


def _select(merges: MergeSet, view: JobInventory, ranks: Ranks) -> Wanted:
    """The merges that are wanted. Ranks tell rank 0 what the checkpoints say that they see: of the
    range that is merged, or of all where a window is in tokens. Collective."""
    run = ranks.broadcast(view.run, "planning")
    told: dict[int, CommonSummary] = {}
    config = merges.shared
    selector = Selector(run, lambda i: told.get(i, UNKNOWN), config.allow_lr_decay)

    def choose() -> Sequence[tuple[MergeConfig, tuple[int, ...]]]:
        return merges.wanted(lambda window: selector.choose(window, merges.sliding_every))

    def place() -> Wanted:
        return [(one, selector.place(chosen)) for one, chosen in choose()]

    asked = list(run.finished)
    if all(one.window_tokens is None for one in merges.merges):
        wanted = ranks.broadcast(choose, "planning")
        chosen = {i for _, c in wanted for i in c}
        asked = [i for i in asked if min(chosen) <= i <= max(chosen)]
        asked = [i for i in asked if i in chosen or view.is_reported(i)]
    told.update(_summaries(config, view, ranks, asked))
    return ranks.broadcast(place, "planning")


def _summaries(
    config: MergeConfig, view: JobInventory, ranks: Ranks, iterations: Sequence[int]
) -> dict[int, CommonSummary]:
    """What checkpoints say of themselves, each read by one rank. Collective."""
    with ranks.together("opening the sources"):
        known = {
            i: read_summary(checkpoint_path(config.run, i))
            for i in iterations
            if view.reporter(i) == ranks.rank
        }
    return {i: said for some in ranks.all_gather(known) for i, said in some.items()}


def _report(
    config: MergeConfig, view: JobInventory, rank: int, iteration: int, newest: bool
) -> _Report:
    source = open_source(checkpoint_path(config.run, iteration), iteration, whole=False)
    common = read_common(source.path, source.layout)
    kinds, flat = Kinds(), None
    if newest:
        kinds = kinds_of(
            source.layout, args_of(source.path, *common), lambda f: (source.path / f).is_file()
        )
        if config.keeps_optimizer or kinds.usual.finer:
            flat = _search(view, rank, source, kinds.usual)
    return _Report(source, common, flat, kinds)


def _search(view: JobInventory, rank: int, source: Source, usual: Representation) -> Search | None:
    """Main params in flat buckets are found by content, which one rank must see."""
    if not flat_buckets(source.layout):
        return None
    _check_seen(view, rank, source)
    return search(source.layout, usual)


def _flat_mains(
    config: MergeConfig,
    view: JobInventory,
    reports: Mapping[int, _Report],
    iterations: Sequence[int],
    usual: Representation,
    ranks: Ranks,
) -> FlatMainParams | None:
    """Where main params lie, on rank 0: equal chunks are told apart by what all ranks see.

    Collective.
    """
    own = reports.get(iterations[-1])
    searches = ranks.all_gather(None if own is None else own.flat)
    found = next((one for one in searches if one is not None), None)
    if found is None:
        return None
    told: dict[int, tuple[Path, Contents]] = {}
    with ranks.together("comparing main params"):
        for i, report in reports.items() if found.unsure else ():
            if found.lies_in(report.source.layout):
                _check_seen(view, ranks.rank, report.source)
                told[i] = report.source.path, contents(report.source.layout, found.unsure, usual)
    by_source = {i: one for some in ranks.gather(told) for i, one in some.items()}
    with ranks.together("planning"):
        newest_first = [by_source[i] for i in sorted(by_source, reverse=True)]
        return settle(found, newest_first, config.keeps_optimizer) if ranks.rank == 0 else None


def _check_seen(view: JobInventory, rank: int, source: Source) -> None:
    if not view.sees_all(rank, source.layout, source.iteration):
        raise UsageError(
            f"{source.path} keeps its main params in flat buckets (dp_reshardable), which one rank "
            "has to search: no rank sees all files of it. Copy them to one node, or use "
            "--optimizer-state drop"
        )


def _plan(
    config: MergeConfig,
    view: JobInventory,
    wanted: Wanted,
    told: Mapping[int, _Report],
    flat: FlatMainParams | None,
    kinds: Kinds,
    ranks: int,
) -> tuple[Job, Assignment]:
    iterations = sorted(told)
    sources = tuple(told[i].source for i in iterations)
    for source in sources:
        view.check(source.layout, source.iteration)
    job = plan_job(
        config, wanted, sources, flat, kinds, lambda source: told[source.iteration].common
    )
    layouts = [source.layout for source in sources]
    seeing = [view.ranks(i) for i in iterations]
    newest = {output.newest for output in job.outputs}
    holders = Assigner(layouts, seeing, newest, ranks, len(job.outputs))
    held = tuple(holders.hold(job.plan.tasks))
    objects: list[dict[str, int]] = [{} for _ in sources]
    for output in job.outputs:
        j = output.newest
        objects[j] |= {k: holders.object(j, k) for k in output.objects if k not in objects[j]}
    assignment = Assignment(
        held,
        tuple(objects),
        tuple(view.reporter(i) for i in iterations),
        tuple(tuple(view.fingerprint(rank, i) for rank in range(ranks)) for i in iterations),
    )
    plan = replace(job.plan, tasks=tuple(one.task for one in held))
    check_whole(plan.tasks)
    return replace(job, plan=plan), assignment

"""Planning a merge whose ranks see different parts of the run, as on node-local storage.

Metadata that rank 0 does not see is read by a rank that does; rank 0 plans for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wsm_megatron.checkpoint.roles import Role, is_flat_bucket
from wsm_megatron.checkpoint.run import checkpoint_path
from wsm_megatron.config import MergeConfig
from wsm_megatron.distributed import Ranks
from wsm_megatron.engine.flat import FlatMains, find_flat_mains
from wsm_megatron.engine.holders import Holders
from wsm_megatron.engine.integers import checksums, compare_checksums, copied_integers
from wsm_megatron.engine.job import Job
from wsm_megatron.engine.plan import check_whole
from wsm_megatron.engine.prepare import Wanted, all_of, plan_job, wanted_merges
from wsm_megatron.engine.sight import View, look
from wsm_megatron.engine.sources import (
    Source,
    choose_checkpoints,
    open_source,
    read_common,
    read_tokens,
    tokens_of,
)
from wsm_megatron.engine.spread import Spread
from wsm_megatron.window import Checkpoint


@dataclass(frozen=True)
class _Report:
    """What one rank tells of a source whose metadata it sees."""

    source: Source
    common: tuple[bytes, str]
    flat: FlatMains | None


def prepare_spread(config: MergeConfig, ranks: Ranks) -> Job:
    """:func:`.prepare_job` from what all ranks see together. Collective.

    Returns:
        the job, with the sources where this rank sees them.

    Raises:
        ValueError: the options do not fit the run. MergeError: a checkpoint is damaged, or no rank
            sees files that are needed.
    """
    with ranks.together("looking at the sources"):
        sight = look(config.load)
    view = View(config.load, ranks.gather(sight))
    tokens = _all_tokens(config, view, ranks) if config.window_tokens is not None else {}
    wanted = ranks.from_first(lambda: _select(config, view, tokens), "planning")
    with ranks.together("opening the sources"):
        iterations = [checkpoint.iteration for checkpoint in all_of(wanted)]
        reports = {
            i: _report(config, view, ranks.rank, i, i == iterations[-1])
            for i in iterations
            if view.reporter(i) == ranks.rank
        }
    told = {i: report for some in ranks.collect(reports) for i, report in some.items()}
    job = ranks.from_first(lambda: _plan(config, view, wanted, told, ranks.size), "planning")
    assert job.spread is not None
    sources = job.spread.seen_from(ranks.rank, config.load, job.sources)
    job = replace(job, config=replace(job.config, load=config.load), sources=sources)
    if copied_integers(job):
        with ranks.together("comparing integer tensors"):
            own = checksums(job, ranks.rank)
        seen = ranks.gather(own)
        ranks.from_first(lambda: compare_checksums(job, seen), "planning")
    return job


def _all_tokens(config: MergeConfig, view: View, ranks: Ranks) -> dict[int, int | None]:
    with ranks.together("opening the sources"):
        known = {
            i: read_tokens(checkpoint_path(config.load, i))
            for i in view.run().finished
            if view.reporter(i) == ranks.rank
        }
    return {i: tokens for some in ranks.gather(known) for i, tokens in some.items()}


def _select(config: MergeConfig, view: View, tokens: Mapping[int, int | None]) -> Wanted:
    run = view.run()
    return wanted_merges(
        config,
        lambda one: choose_checkpoints(run, one.windows[0], config.sliding_every, tokens.get),
    )


def _report(config: MergeConfig, view: View, rank: int, iteration: int, newest: bool) -> _Report:
    source = open_source(config.load, Checkpoint(iteration), whole=False)
    common = read_common(source.path, source.layout)
    flat = _flat_mains(view, rank, source) if newest and config.keeps_optimizer else None
    return _Report(replace(source, tokens=tokens_of(common)), common, flat)


def _flat_mains(view: View, rank: int, source: Source) -> FlatMains | None:
    """Main params in flat buckets are found by content, which one rank must see."""
    tensors = source.layout.tensors.items()
    if not any(entry.role is Role.MAIN and is_flat_bucket(key) for key, entry in tensors):
        return None
    if not view.sees_all(rank, source.layout, source.iteration):
        raise ValueError(
            f"{source.path} keeps its main params in flat buckets (dp_reshardable), which one rank "
            "has to search: no rank sees all files of it. Copy them to one node, or use "
            "--optimizer-state drop"
        )
    return find_flat_mains(source.layout)


def _plan(
    config: MergeConfig, view: View, wanted: Wanted, told: Mapping[int, _Report], ranks: int
) -> Job:
    tokens = {i: report.source.tokens for i, report in told.items()}
    wanted = [
        (one, tuple(Checkpoint(c.iteration, tokens[c.iteration]) for c in chosen))
        for one, chosen in wanted
    ]
    iterations = sorted(told)
    sources = tuple(told[i].source for i in iterations)
    for source in sources:
        view.check(source.layout, source.iteration)
    flat = told[iterations[-1]].flat
    job = plan_job(config, wanted, sources, flat, lambda source: told[source.iteration].common)
    layouts = [source.layout for source in sources]
    seeing = [view.ranks(i) for i in iterations]
    newest = {product.newest for product in job.products}
    holders = Holders(layouts, seeing, newest, ranks, len(job.products))
    held = tuple(holders.hold(job.plan.tasks))
    objects: list[dict[str, int]] = [{} for _ in sources]
    for product in job.products:
        j = product.newest
        objects[j] |= {k: holders.object(j, k) for k in product.objects if k not in objects[j]}
    spread = Spread(
        held,
        tuple(objects),
        tuple(view.reporter(i) for i in iterations),
        tuple(tuple(view.fingerprint(rank, i) for rank in range(ranks)) for i in iterations),
    )
    plan = replace(job.plan, tasks=tuple(one.task for one in held))
    check_whole(plan.tasks)
    return replace(job, plan=plan, spread=spread)

"""Preparing a merge job: selecting and opening the sources, and planning what is made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common_state import load_common, prepare, read_common
from wsm_megatron.checkpoint.formats import TORCH_DIST_016, CheckpointFormat, CommonEntries
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.older_readers import for_common_file, without_rerun_state
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.side_files import warn_of_left_out
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.optimizer.flat_main_params import FlatMainParams, find_flat_main_params
from wsm_megatron.optimizer.precision import Kinds, args_of, kinds_of
from wsm_megatron.planning.adapters import adapter_pairs
from wsm_megatron.planning.compatibility import check_alike
from wsm_megatron.planning.integers import check_integers
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.launch_flags import describe_resume
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.named_sources import place_sources
from wsm_megatron.planning.plan import kept_objects, make_plan
from wsm_megatron.planning.provenance import describe, describe_source
from wsm_megatron.planning.selection import selector
from wsm_megatron.planning.sources import Source, check_saves, open_source
from wsm_megatron.planning.tasks import Rule
from wsm_megatron.process.gc_paused import gc_paused
from wsm_megatron.schedule.window import Checkpoint

logger = logging.getLogger(__name__)

Wanted = Sequence[tuple[MergeConfig, tuple[Checkpoint, ...]]]
"""Every single merge, and the checkpoints that it is of, oldest first."""


def prepare_job(
    merges: MergeConfig | MergeSet, execution: ExecutionOptions = ExecutionOptions()
) -> Job:
    """Select, open and plan. Reads metadata and common states only; writes nothing.

    Raises:
        UsageError: the options do not fit the run. MergeError: a checkpoint is damaged.
    """
    merges = MergeSet.of(merges) if isinstance(merges, MergeConfig) else merges
    with gc_paused():
        wanted, config = _wanted(merges), merges.shared
        sources = tuple(
            open_source(
                c.path or checkpoint_path(config.run, c.iteration),
                c.iteration,
                optimizer=config.keeps_optimizer,
            )
            for c in all_of(wanted)
        )
        *older, newest = (source.layout for source in sources)
        flat, kinds = find_mains(config, newest, older)
        job = plan_job(
            config, wanted, sources, flat, kinds, lambda s: read_common(s.path, s.layout)
        )
        job = replace(job, execution=execution)
        check_integers(job)
        return job


def _wanted(merges: MergeSet) -> Wanted:
    shared = merges.shared
    if shared.load is None:
        placed = place_sources(shared.sources, shared.allow_lr_decay, shared.min_checkpoints)
        return [(placed.weigh(one), placed.checkpoints) for one in merges.merges]
    select = selector(shared.load, shared.allow_lr_decay).select
    return merges.wanted(lambda window: select(window, merges.sliding_every))


def find_mains(
    config: MergeConfig, newest: Layout, older: Sequence[Layout]
) -> tuple[FlatMainParams | None, Kinds]:
    """Main params that are merged: where they lie in the newest source's flat buckets, if it has
    some, and how they are kept.

    Raises:
        MergeError: main params are of other weights than the model, or a tensor cannot be read.
    """
    kinds = kinds_of(newest, args_of(newest.path, *read_common(newest.path, newest)))
    if not config.keeps_optimizer and not kinds.usual.finer:
        return None, kinds
    return find_flat_main_params(newest, older, kinds.usual, must=config.keeps_optimizer), kinds


def plan_job(
    config: MergeConfig,
    wanted: Wanted,
    sources: tuple[Source, ...],
    flat: FlatMainParams | None,
    kinds: Kinds,
    common_of: Callable[[Source], tuple[bytes | CommonEntries, str]],
) -> Job:
    """:func:`prepare_job` once the sources are opened.

    Args:
        sources: those of :func:`all_of`, in its order.
        flat: main params in the newest source's flat buckets. kinds: how it keeps all of them.
        common_of: a source's common state, as :func:`read_common` gives it.
    """
    check_saves(sources)
    layouts = [source.layout for source in sources]
    plan = make_plan(layouts, config, flat, kinds)
    if plan.rebuilds_main_params and not config.rebuild_main_params:
        logger.warning(
            "the sources keep their optimizer state differently: main params are rebuilt from the "
            "merged model, as with --rebuild-main-params"
        )
        config = replace(config, rebuild_main_params=True)
        wanted = [(replace(one, rebuild_main_params=True), chosen) for one, chosen in wanted]
    index = {_place(checkpoint): j for j, checkpoint in enumerate(all_of(wanted))}
    outputs = tuple(
        _product(one, chosen, [index[_place(c)] for c in chosen], sources, common_of)
        for one, chosen in wanted
    )
    job = Job(config, sources, outputs, plan)
    _check_copied(job)
    _warn_of_adapters(job)
    _warn_of_weights_alone(job)
    newest = sorted({output.newest for output in outputs})
    warn_of_left_out([(sources[j].path, sources[j].beside) for j in newest])
    return job


def _check_copied(job: Job) -> None:
    """Every output's own newest source has what is copied from it."""
    copied = [recipe for recipe in job.plan.recipes if recipe.rule is Rule.COPY]
    layouts = [job.newest(output) for output in job.outputs] + [job.sources[-1].layout]
    for recipe in copied:
        for key in recipe.inputs:
            check_alike(layouts, key)


def _warn_of_adapters(job: Job) -> None:
    summed = [recipe.key for recipe in job.plan.recipes if recipe.rule is not Rule.COPY]
    if pairs := adapter_pairs(summed):
        logger.warning(
            "%s: %s are factors of adapters (LoRA), as are %d pairs in all: the output of merged "
            "factors is not the merge of their outputs, unless one of them is the same in all "
            "sources; merge checkpoints whose adapters are folded into the weights instead",
            job.sources[-1].path, " and ".join(pairs[0]), len(pairs),
        )  # fmt: skip


def _warn_of_weights_alone(job: Job) -> None:
    newest = job.sources[-1].layout
    if not job.config.keeps_optimizer and (why := newest.format.weights_alone):
        logger.warning("%s: %s; --optimizer-state last or merge resumes", newest.path, why)


def all_of(wanted: Wanted) -> list[Checkpoint]:
    """All checkpoints of some merges, oldest first."""
    checkpoints = {_place(c): c for _, chosen in wanted for c in chosen}
    return sorted(checkpoints.values(), key=lambda c: c.iteration)


def _place(checkpoint: Checkpoint) -> tuple[int, Path | None]:
    """What tells one source of a job from another."""
    return checkpoint.iteration, checkpoint.path


def _product(
    config: MergeConfig,
    chosen: tuple[Checkpoint, ...],
    source_indices: Sequence[int],
    opened: tuple[Source, ...],
    common_of: Callable[[Source], tuple[bytes | CommonEntries, str]],
) -> OutputCheckpoint:
    decay = config.weigh(chosen)
    sources = tuple(opened[j] for j in source_indices)
    newest = sources[-1]
    iteration = newest.iteration if config.output_iteration is None else config.output_iteration
    before = load_common(*common_of(newest))
    described = list(map(describe_source, sources, chosen))
    provenance = describe(described, decay, config, iteration)
    state = {**before, "iteration": iteration}
    provenance["resume"] = describe_resume(state, config, newest.layout.format)
    common = common_of_merge(newest.layout, before, config, iteration, provenance)
    return OutputCheckpoint(
        root=config.save,
        iteration=iteration,
        source_indices=tuple(source_indices),
        decay=decay,
        objects=common.objects,
        common=common.format.store(common.state),
        format=common.format,
        provenance=provenance,
    )


@dataclass(frozen=True)
class MergedCommon:
    """The common state of a merged checkpoint, and the byte entries that go with it.

    Attributes:
        objects: keys of byte entries that are copied from the newest source.
        format: what the merge is written as.
    """

    state: dict[str, Any]
    objects: tuple[str, ...]
    format: CheckpointFormat


def common_of_merge(
    newest: Layout,
    before: dict[str, Any],
    config: MergeConfig,
    iteration: int,
    provenance: dict[str, Any],
) -> MergedCommon:
    """What a merge makes of its newest source's common state.

    Args:
        before: that state. config: of one merge. iteration: of the merged checkpoint.
    """
    state = prepare(
        before,
        iteration=iteration,
        drop_optimizer=not config.keeps_optimizer,
        provenance=provenance,
        where=str(newest.path),
    )
    wanted = newest.format.converted(config.format)
    objects = kept_objects(newest, config)
    if wanted is not newest.format:
        state, objects = without_rerun_state(state, objects)
    if wanted is TORCH_DIST_016 and config.format != "same":  # as saved, its version reads it
        state = for_common_file(state)
    return MergedCommon(state, objects, wanted)

"""Preparing a merge job: selecting and opening the sources, and planning what is made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from wsm_megatron.checkpoint.common_state import load_common, prepare, read_common
from wsm_megatron.checkpoint.formats import TORCH_DIST_016, CheckpointFormat, CommonEntries
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.older_readers import for_common_file, without_rerun_state
from wsm_megatron.checkpoint.side_files import warn_of_left_out
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.optimizer.flat_main_params import FlatMainParams, find_flat_main_params
from wsm_megatron.optimizer.precision import Kinds, args_of, kinds_of
from wsm_megatron.planning.adapters import adapter_pairs
from wsm_megatron.planning.compatibility import check_alike
from wsm_megatron.planning.integers import check_integers
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.launch_flags import describe_resume
from wsm_megatron.planning.plan import kept_objects, make_plan
from wsm_megatron.planning.provenance import describe, describe_source
from wsm_megatron.planning.selection import selector
from wsm_megatron.planning.sources import Source, check_saves, open_source
from wsm_megatron.planning.tasks import Rule
from wsm_megatron.process.gc_paused import gc_paused
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint, Window

logger = logging.getLogger(__name__)

Chosen = TypeVar("Chosen")
"""The checkpoints of one merge, in whatever form."""

Wanted = Sequence[tuple[MergeConfig, tuple[Checkpoint, ...]]]
"""Every single merge, and the checkpoints that it is of, oldest first."""


def prepare_job(config: MergeConfig, execution: ExecutionOptions = ExecutionOptions()) -> Job:
    """Select, open and plan. Reads metadata and common states only; writes nothing.

    Raises:
        UsageError: the options do not fit the run. MergeError: a checkpoint is damaged.
    """
    with gc_paused():
        select = selector(config.load, config.allow_lr_decay).select
        wanted = wanted_merges(config, lambda window: select(window, config.sliding_every))
        sources = tuple(
            open_source(config.load, c.iteration, optimizer=config.keeps_optimizer)
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


def find_mains(
    config: MergeConfig, newest: Layout, older: Sequence[Layout]
) -> tuple[FlatMainParams | None, Kinds]:
    """Main params that are merged: where they lie in the newest source's flat buckets, if it has
    some, and how they are kept.

    Raises:
        MergeError: main params are of other weights than the model, or a tensor cannot be read.
    """
    kinds = kinds_of(newest, args_of(*read_common(newest.path, newest)))
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
    outputs = tuple(_product(config, one, chosen, sources, common_of) for one, chosen in wanted)
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


def wanted_merges(
    config: MergeConfig, select: Callable[[Window], Sequence[Chosen]]
) -> Sequence[tuple[MergeConfig, Chosen]]:
    """Every merge that a config asks for; ``select`` finds the checkpoints of one window."""
    selected = cache(select)
    return [(one, chosen) for one in _single_merges(config) for chosen in selected(one.windows[0])]


def all_of(wanted: Wanted) -> list[Checkpoint]:
    """All checkpoints of some merges, oldest first."""
    checkpoints = {c.iteration: c for _, chosen in wanted for c in chosen}
    return [checkpoints[i] for i in sorted(checkpoints)]


def _single_merges(config: MergeConfig) -> list[MergeConfig]:
    """A config for every window and decay, without sliding."""
    lengths = [
        {"window_iterations": i, "window_tokens": t}
        for i in _each(config.window_iterations)
        for t in _each(config.window_tokens)
    ]
    return [
        replace(config, decay=decay, sliding_every=None, **length)
        for length in lengths
        for decay in config.decays
    ]


def _each(values: tuple[int, ...] | None) -> list[Any]:
    return [None] if values is None else [(value,) for value in values]


def product_roots(config: MergeConfig) -> list[tuple[MergeConfig, Path]]:
    """Every single merge that a config asks for, and the root that its checkpoints get."""
    return [(one, _root(config, one)) for one in _single_merges(config)]


def _root(config: MergeConfig, one: MergeConfig) -> Path:
    """``--save``; where it gets merges of several decays or windows, a folder for each."""
    names = []
    if len(config.decays) > 1:
        names.append(Path(one.decay).stem)
    if len(config.windows) > 1:
        for length, unit in ((one.window_iterations, "iterations"), (one.window_tokens, "tokens")):
            names += [f"{n}-{unit}" for n in length or ()]
    return config.save / "-".join(names) if names else config.save


def _product(
    whole: MergeConfig,
    config: MergeConfig,
    chosen: tuple[Checkpoint, ...],
    opened: tuple[Source, ...],
    common_of: Callable[[Source], tuple[bytes | CommonEntries, str]],
) -> OutputCheckpoint:
    decay = MergeCoefficients.over(
        chosen, config.decay, config.min_decay, config.weights, config.allow_unnormalized
    )
    index = {source.iteration: j for j, source in enumerate(opened)}
    source_indices = tuple(index[checkpoint.iteration] for checkpoint in chosen)
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
        root=_root(whole, config),
        iteration=iteration,
        source_indices=source_indices,
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

"""Preparing a merge job: selecting and opening the sources, and planning what is made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common import dump_common, load_common, prepare
from wsm_megatron.checkpoint.format import for_common_file, without_rerun_state
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.compatible import check_entry
from wsm_megatron.engine.flags import describe_resume
from wsm_megatron.engine.flat import FlatMains, find_flat_mains
from wsm_megatron.engine.job import Job, Product
from wsm_megatron.engine.plan import kept_objects, make_plan
from wsm_megatron.engine.provenance import describe, describe_source
from wsm_megatron.engine.recipe import Rule
from wsm_megatron.engine.sources import (
    Source,
    decay_over,
    open_source,
    read_common,
    select_checkpoints,
)
from wsm_megatron.garbage import no_collection
from wsm_megatron.window import Checkpoint

logger = logging.getLogger(__name__)

Wanted = Sequence[tuple[MergeConfig, tuple[Checkpoint, ...]]]
"""Every single merge, and the checkpoints that it is of, oldest first."""


def prepare_job(config: MergeConfig) -> Job:
    """Select, open and plan. Reads metadata and common states only; writes nothing.

    Raises:
        ValueError: the options do not fit the run. MergeError: a checkpoint is damaged.
    """
    with no_collection():
        wanted = wanted_merges(
            config,
            lambda one: select_checkpoints(config.load, one.windows[0], config.sliding_every),
        )
        sources = tuple(open_source(config.load, checkpoint) for checkpoint in all_of(wanted))
        flat = find_flat_mains(sources[-1].layout) if config.keeps_optimizer else None
        return plan_job(config, wanted, sources, flat, lambda s: read_common(s.path, s.layout))


def plan_job(
    config: MergeConfig,
    wanted: Wanted,
    sources: tuple[Source, ...],
    flat: FlatMains | None,
    common_of: Callable[[Source], tuple[bytes, str]],
) -> Job:
    """:func:`prepare_job` once the sources are opened.

    Args:
        flat: main params in the newest source's flat buckets.
        common_of: a source's common state, as :func:`read_common` gives it.
    """
    layouts = [source.layout for source in sources]
    plan = make_plan(layouts, config, flat)
    if plan.rebuilds_mains and not config.mains_from_model:
        logger.warning(
            "the sources keep their optimizer state differently: main params are rebuilt from the "
            "merged model, as with --mains-from-model"
        )
        config = replace(config, mains_from_model=True)
        wanted = [(replace(one, mains_from_model=True), chosen) for one, chosen in wanted]
    products = tuple(_product(config, one, chosen, sources, common_of) for one, chosen in wanted)
    job = Job(config, sources, products, plan)
    _check_copied(job)
    return job


def _check_copied(job: Job) -> None:
    """Every product's own newest source has what is copied from it."""
    copied = [recipe for recipe in job.plan.recipes if recipe.rule is Rule.COPY]
    for product in job.products:
        layout = job.newest(product)
        for recipe in copied:
            check_entry(layout, job.sources[-1].layout, recipe.key)


def wanted_merges(
    config: MergeConfig, select: Callable[[MergeConfig], tuple[tuple[Checkpoint, ...], ...]]
) -> Wanted:
    """Every merge that a config asks for; ``select`` finds the checkpoints of one window."""
    return [(one, chosen) for one in _single_merges(config) for chosen in select(one)]


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
    common_of: Callable[[Source], tuple[bytes, str]],
) -> Product:
    decay = decay_over(
        chosen, config.decay, config.min_decay, config.weights, config.allow_unnormalized
    )
    index = {source.iteration: j for j, source in enumerate(opened)}
    members = tuple(index[checkpoint.iteration] for checkpoint in chosen)
    sources = tuple(opened[j] for j in members)
    newest = sources[-1]
    iteration = newest.iteration if config.output_iteration is None else config.output_iteration
    before = load_common(*common_of(newest))
    provenance = describe(list(map(describe_source, sources)), decay, config, iteration)
    provenance["resume"] = describe_resume({**before, "iteration": iteration}, config)
    state = prepare(
        before,
        iteration=iteration,
        drop_optimizer=not config.keeps_optimizer,
        provenance=provenance,
        where=str(newest.path),
    )
    was_in_distcp = newest.layout.common_entry is not None
    in_distcp = was_in_distcp if config.format == "same" else config.format == "0.19"
    objects = kept_objects(newest.layout, config)
    if in_distcp != was_in_distcp:
        state, objects = without_rerun_state(state, objects)
    if not in_distcp:
        state = for_common_file(state)
    return Product(
        root=_root(whole, config),
        iteration=iteration,
        members=members,
        decay=decay,
        objects=objects,
        common=dump_common(state, in_distcp=in_distcp),
        in_distcp=in_distcp,
        provenance=provenance,
    )

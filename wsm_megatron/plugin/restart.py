"""After a restart: which kept checkpoints are there, and belong to the run that was loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from wsm_megatron.plugin.collectives import all_gather, is_first_rank, on_all_ranks
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.store import Found, Store
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)


def take_stock(store: Store, iteration: int) -> tuple[dict[int, Consumed], set[int]]:
    """What a store holds for a restart at ``iteration``. Collective.

    Deletes what is newer (of a future that did not happen) and what some rank has not got.

    Returns:
        The checkpoints that every rank has, by iteration, and the iterations that some rank has
        under another parallel layout.
    """
    found = store.found()
    everywhere: list[Found] = all_gather(found)
    whole = set.intersection(*({c.iteration for c in f.checkpoints} for f in everywhere))
    whole = {i for i in whole if i <= iteration}
    for checkpoint in found.checkpoints:
        if checkpoint.iteration not in whole:
            store.drop(checkpoint.iteration)
    for misfit in found.misfits:
        if misfit > iteration:
            store.drop(misfit)
    misfits = set.union(*(set(f.misfits) for f in everywhere))
    kept = {c.iteration: c for c in found.checkpoints if c.iteration in whole}
    return kept, {i for i in misfits if i <= iteration}


def is_live(store: Store, shards: Sequence[Shard], iteration: int) -> bool:
    """Whether the kept main params and buffers equal the live ones on every rank. Collective."""
    same = all(
        torch.equal(store.get(iteration, index), shard.owned().float().cpu())
        for index, shard in enumerate(shards)
        if shard.name.startswith(("main.", "buffer."))
    )
    return on_all_ranks(same)


def leads_to(one: Consumed, later: Consumed) -> bool:
    """Whether a checkpoint lies on the way to a later one; if not, the first rank warns of it.

    All that a job saves says from which iteration the job had started. What lies behind that
    iteration and says another is of a branch that was given up.
    """
    if one.began is None or later.began is None or one.iteration <= later.began:
        return True
    if one.began != later.began and is_first_rank():
        logger.warning(
            "wsm: window without iteration %d: it is of a job that started from iteration %d, and "
            "not on the way to iteration %d, whose job started from %d",
            *(one.iteration, one.began, later.iteration, later.began),
        )
    return one.began == later.began

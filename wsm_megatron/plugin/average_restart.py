"""After a restart: a moving average goes on from the newest merged checkpoint, which is it."""

from __future__ import annotations

import logging
from pathlib import Path

from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.run_directory import list_checkpoints
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.plugin.collectives import broadcast, is_first_rank
from wsm_megatron.plugin.refill import leads_to
from wsm_megatron.plugin.trainer import Checkpoints
from wsm_megatron.plugin.wsm import WSM
from wsm_megatron.schedule.half_life import Averaged, HalfLife

logger = logging.getLogger(__name__)


def take_up_average(wsm: WSM, root: Path | None, checkpoints: Checkpoints) -> None:
    """Let the moving average of a run go on. Collective; weights are loaded, and are so again at
    the end, exactly.

    Its main params are loaded by the framework, as any checkpoint's: the parallel layout may be
    another than that of the job that wrote them. Where there is no such checkpoint the average
    begins anew, with a warning.

    Args:
        root: of the merged checkpoints; None where there are none.
    """
    start, half_life = checkpoints.start, wsm.config.moving
    assert half_life is not None, "of a moving average"
    if not start.iteration:
        return
    written = broadcast(
        lambda: list_averages(root, start.iteration, half_life), f"looking into {root}"
    )
    state = next((one for one in written if leads_to(one.last, start)), None)
    if state is None:
        _warn(
            "the moving average begins anew at iteration %d: no merged checkpoint before it, of "
            "half-life %d %s, has its main params",
            *(start.iteration, half_life.length, half_life.unit),
        )
        return
    assert root is not None, "it was found there"
    iteration = state.last.iteration
    if checkpoints.load_merge(root, iteration):
        wsm.restore(state)
        if iteration < start.iteration:
            _warn(
                "the moving average goes on from merged checkpoint %d at iteration %d: samples "
                "between the two ended with the job that took them",
                *(iteration, start.iteration),
            )
    else:
        _warn(
            "the moving average begins anew at iteration %d: in merged checkpoint %d main params "
            "are not those of its weights",
            *(start.iteration, iteration),
        )
    checkpoints.load(start.iteration)


def list_averages(root: Path | None, until: int, half_life: HalfLife) -> list[Averaged]:
    """The moving averages of a half-life that merged checkpoints hold with their main params, up to
    an iteration; newest first."""
    if root is None or not root.is_dir():
        return []
    found = []
    for iteration, path in sorted(list_checkpoints(root).items(), reverse=True):
        if iteration > until or not is_complete(path):
            continue
        merged = read_provenance(path)
        if merged is None or merged["options"].get("optimizer_state") == "drop":
            continue
        described = merged["sources"][-1].get("moving_average") if merged["sources"] else None
        if described is not None and (state := Averaged.read(described)).half_life == half_life:
            found.append(state)
    return found


def _warn(message: str, *values: object) -> None:
    if is_first_rank():
        logger.warning("wsm: " + message, *values)

"""The trajectory of a window, as lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wsm_megatron.config import ExecutionOptions
from wsm_megatron.inspection.trajectory import NAME
from wsm_megatron.trajectory.geometry import Geometry
from wsm_megatron.trajectory.record import Trajectory
from wsm_megatron.trajectory.strays import FEWEST

_PARTS = 24
"""Parts of a model that are shown without ``-v``."""


def trajectory_lines(found: Trajectory, *, verbose: bool = False) -> Iterator[str]:
    """Each checkpoint's place, what the updates are made of, what decays do, and what is off."""
    yield from _points(found)
    yield from _roles(found)
    yield from _parts(found, verbose)
    drift, walk, jitter = found.variance.shares
    yield (
        f"a mean squared update is {drift:.0%} drift (progress), {walk:.0%} random walk, "
        f"{jitter:.0%} jitter (gone by the next checkpoint)"
    )
    yield f"{'decay':>16}  averaged away  progress kept  steps from the newest"
    for one in found.decayed():
        yield (
            f"{one.decay:>16}  {one.averaged_away:>13.1%}  {one.progress_kept:>13.1%}  "
            f"{one.distance:>21.2f}"
        )
    if found.missing:
        yield f"not known: {found.missing:,} elements, which an earlier merge had finished"
    if len(found.points) < FEWEST:
        yield f"whether they lie on one path, {len(found.points)} checkpoints cannot tell"
    elif not found.strays:
        yield "every checkpoint lies on the run's path"
    yield from (f"warning: {one}" for one in found.warnings())


def observed(
    execution: ExecutionOptions, found: Trajectory | None, save: Path, *, verbose: bool = False
) -> Iterator[str]:
    """:func:`trajectory_lines` of what a merge has read on its way, where it was asked to."""
    if found is not None:
        yield from trajectory_lines(found, verbose=verbose)
        yield f"trajectory: {save / NAME}"
    elif execution.trajectory:
        yield (
            "no trajectory: nothing was read, as all was there already; wsm inspect RUN "
            "--trajectory reads"
        )


def _points(found: Trajectory) -> Iterator[str]:
    geometry = found.weights
    yield (
        f"{'iteration':>16}  {'norm':>12}  {'step from the last':>18}  {'cosine of steps':>15}  "
        f"{'to the mean':>12}"
    )
    steps = ["", *(f"{step:.6g}" for step in geometry.steps)]
    cosines = ["", *(f"{one:+.3f}" for one in geometry.cosines), ""]
    rows = zip(found.points, geometry.norms, steps, cosines, geometry.to_mean, strict=False)
    for point, norm, step, cosine, mean in rows:
        yield f"{point.iteration:>16}  {norm:>12.6g}  {step:>18}  {cosine:>15}  {mean:>12.6g}"


def _roles(found: Trajectory) -> Iterator[str]:
    for role, geometry in found.by_role.items():
        count = geometry.gram.elements
        yield f"  {role:16} {count:>16,} elements  {_summary(geometry)}"


def _parts(found: Trajectory, verbose: bool) -> Iterator[str]:
    parts = found.by_part
    shown = list(parts)
    if not verbose and len(shown) > _PARTS:
        shown = [*shown[: _PARTS // 2], *shown[-_PARTS // 2 :]]
    width = max(len(part) for part in shown)
    for part in shown:
        yield f"  {part:{width}}  {_summary(parts[part])}"
    if len(shown) < len(parts):
        yield f"  and {len(parts) - len(shown)} more (-v lists them)"


def _summary(geometry: Geometry) -> str:
    norm, steps, cosines = geometry.norms[-1], geometry.steps, geometry.cosines
    relative = steps.mean() / norm if norm else 0.0
    angle = f"{cosines.mean():+.3f}" if len(cosines) else "-"
    return f"norm {norm:10.4g}  a step is {relative:.3%} of it, cosine of steps {angle}"

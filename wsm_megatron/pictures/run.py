"""A run: its learning rate, its checkpoints, and their losses where these are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.inspect import RunCheckpoint, RunContents
from wsm_megatron.pictures.style import COLOURS, legend, new_figure, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_run(
    contents: RunContents, scores: Mapping[int, float] | None = None, metric: str = "loss"
) -> Figure:
    """Learning rate over what was trained, with a mark for every checkpoint.

    Args:
        scores: of checkpoints, by iteration; drawn below.

    Raises:
        UsageError: no checkpoint is there.
    """
    checkpoints = contents.checkpoints
    if not checkpoints:
        raise UsageError(f"{contents.path}: no finished checkpoint to draw")
    counted = all(one.tokens is not None for one in checkpoints)
    unit = "tokens" if counted else "iterations"
    at, label = scaled([_place(one, counted) for one in checkpoints], unit)
    places = {one.iteration: x for one, x in zip(checkpoints, at, strict=True)}
    scored = {i: value for i, value in (scores or {}).items() if i in places}
    figure = new_figure()
    rows = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    _rates(rows[0], checkpoints, places)
    rows[0].set_title(f"{contents.path.name}: {len(checkpoints)} checkpoints")
    if scored:
        line = sorted((places[i], value) for i, value in scored.items())
        rows[1].plot(*zip(*line, strict=True), marker="o", color=COLOURS[1])
        rows[1].set_ylabel(metric)
    rows[-1].set_xlabel(label)
    return figure


def _place(one: RunCheckpoint, counted: bool) -> int:
    return one.tokens if counted and one.tokens is not None else one.iteration


def _rates(axes: Axes, checkpoints: tuple[RunCheckpoint, ...], places: Mapping[int, float]) -> None:
    known = [(places[one.iteration], one.lr) for one in checkpoints if one.lr is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=COLOURS[0], label="learning rate")
    highest = max((lr for _, lr in known), default=1.0)
    kinds = (("trained checkpoint", False, "o", COLOURS[0]), ("merged", True, "D", COLOURS[1]))
    for name, merged, marker, colour in kinds:
        chosen = [one for one in checkpoints if one.is_merged == merged]
        if chosen:
            x = [places[one.iteration] for one in chosen]
            y = [one.lr if one.lr is not None else highest for one in chosen]
            axes.plot(x, y, marker, color=colour, label=name)
    marked = [one for one in checkpoints if one.marks]
    if marked:
        x = [places[one.iteration] for one in marked]
        y = [one.lr if one.lr is not None else highest for one in marked]
        axes.plot(x, y, "x", color="black", markersize=12, label="with a remark (wsm inspect)")
    axes.set_ylim(0.0, 1.15 * (highest or 1.0))
    axes.set_ylabel("learning rate" if known else "learning rate not known")
    legend(axes)

"""A sweep: scores of its merges, by window or by end point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wsm_megatron.errors import UsageError
from wsm_megatron.pictures.style import COLOURS, GREY, MARKERS, legend, new_figure, scaled, short
from wsm_megatron.schedule.order import SEQUENTIAL
from wsm_megatron.sweeps.manifest import SweptMerge
from wsm_megatron.sweeps.metric import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = len(COLOURS) - 1
_BEST = 14
"""Merges that are named, one under the other."""

Scores = Mapping[str, float]
"""By path."""


def draw_sweep(
    merges: Sequence[SweptMerge],
    scores: Scores,
    metric: Metric,
    trained: Mapping[int, float] | None = None,
) -> Figure:
    """The best merges by name, and all of them by their window; by their end point, where there are
    several.

    Args:
        scores: of merges, by path. trained: of trained checkpoints, by iteration.

    Raises:
        UsageError: no merge has a score.
    """
    ranked = sorted(
        (one for one in merges if one.path in scores), key=lambda one: metric.rank(scores[one.path])
    )
    if not ranked:
        raise UsageError(f"no merge has a score of {metric.name}: nothing to draw")
    newest = (trained or {}).get(max(one.iteration for one in ranked))
    figure = new_figure(9.6)
    above, below = figure.subplots(2, 1, height_ratios=(1.15, 1.0))
    _by_name(above, ranked[:_BEST], scores, metric)
    _by_axis(below, ranked, scores, metric, trained or {})
    if newest is not None:
        above.axvline(newest, label="trained, newest", color="black", linestyle="--", linewidth=1.5)
    legend(above)
    legend(below)
    return figure


def _by_name(axes: Axes, best: Sequence[SweptMerge], scores: Scores, metric: Metric) -> None:
    rows = range(len(best))
    axes.plot([scores[one.path] for one in best], rows, "o", color=COLOURS[0])
    several = len({one.iteration for one in best}) > 1
    names = [one.name.replace("/", "  ") if several else one.name.split("/")[0] for one in best]
    axes.set_yticks(list(rows), list(map(short, names)), fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.name} ({metric.way})")
    axes.set_title(
        f"The best {len(best)} merges" if len(best) == _BEST else "The merges, best first"
    )


def _by_axis(
    axes: Axes,
    ranked: Sequence[SweptMerge],
    scores: Scores,
    metric: Metric,
    trained: Mapping[int, float],
) -> None:
    ends = len({one.iteration for one in ranked}) > 1
    series: dict[str, list[SweptMerge]] = {}
    for one in ranked:
        series.setdefault(_label(one, ends), []).append(one)
    spans = [_place(one, ends) for one in ranked]
    largest = max(spans, key=abs)
    unit = "iterations" if ends else ranked[0].unit
    for n, (name, chosen) in enumerate(series.items()):
        points = sorted((_place(one, ends), scores[one.path]) for one in chosen)
        (*at, _), _ = scaled([place for place, _ in points] + [largest], unit)
        values = [value for _, value in points]
        if n < _SERIES or len(series) <= len(COLOURS):
            look: Any = {"marker": MARKERS[n], "color": COLOURS[n], "label": short(name, 26)}
            axes.plot(at, values, zorder=3 - n / len(COLOURS), **look)  # the best on top
        else:
            more = f"{len(series) - _SERIES} more" if n == _SERIES else None
            axes.plot(at, values, marker=".", color=GREY, linewidth=0.8, zorder=1, label=more)
    if ends and (line := sorted(pair for pair in trained.items() if pair[0] in set(spans))):
        x, y = zip(*line, strict=True)
        axes.plot(x, y, color="black", linestyle="--", linewidth=1.5, marker=".", label="trained")
    _, label = scaled([largest], unit)
    what = "end point" if ends else "length of the window"
    axes.set_xlabel(f"{what}: {label}")
    axes.set_ylabel(metric.name)
    axes.set_title(f"By {what}, best curve first")


def _place(one: SweptMerge, ends: bool) -> int:
    return one.iteration if ends else one.positions[-1] - one.positions[0]


def _label(one: SweptMerge, ends: bool) -> str:
    """What tells a curve from others: everything but its axis."""
    parts = [one.decay or "weights"]
    if one.min_decay:
        parts.append(f"floor {one.min_decay:g}")
    if one.order != SEQUENTIAL:
        parts.append(one.order + (f" {one.order_seed}" if one.order_seed else ""))
    if ends:
        window = {name: value for name, value in one.window.items() if name != "to"}
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in window.items()]
    return ", ".join(parts)

"""The path of a run: where its checkpoints lie, how far they step, what a decay averages away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsm_megatron.pictures.style import COLOURS, GREY, MARKERS, new_figure
from wsm_megatron.trajectory.record import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 8
"""Points with a name, at most: the first, the last, and some in between."""


def draw_trajectory(found: Trajectory) -> Figure:
    """Four pictures of one window."""
    figure = new_figure(9.6)
    (path, apart), (steps, decays) = figure.subplots(2, 2)
    _path(path, found)
    _distances(apart, found, figure)
    _steps(steps, found)
    _decays(decays, found)
    return figure


def _path(axes: Axes, found: Trajectory) -> None:
    places, shares = found.weights.projected()
    x, y = places[:, 0], places[:, 1]
    axes.plot(x, y, "-", color=GREY, linewidth=1.2, zorder=1)
    axes.plot(x, y, "o", color=COLOURS[0], label="checkpoint")
    off = [one.place for one in found.strays]
    if off:
        axes.plot(
            x[off], y[off], "X", color=COLOURS[1], markersize=13, zorder=3, label="off the path"
        )
        axes.legend(loc="best")
    for j in _some(len(x), off):
        axes.annotate(
            str(found.points[j].iteration),
            (x[j], y[j]),
            textcoords="offset points",
            xytext=(6, 6),
            fontsize=10,
        )
    axes.margins(0.15)
    axes.set_xlabel(f"first axis ({shares[0]:.0%} of the spread)")
    axes.set_ylabel(f"second ({shares[1]:.0%})")
    axes.set_title("The path, in its plane")


def _distances(axes: Axes, found: Trajectory, figure: Figure) -> None:
    apart = np.sqrt(found.weights.squared_distances)
    image = axes.imshow(apart, cmap="cividis", origin="lower")
    ticks = _some(len(apart))
    names = [str(found.points[j].iteration) for j in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", fontsize=10)
    axes.set_yticks(ticks, names, fontsize=10)
    axes.grid(False)
    axes.set_xlabel("iteration")
    axes.set_title("Distance between checkpoints")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)


def _steps(axes: Axes, found: Trajectory) -> None:
    geometry = found.weights
    ends = [one.iteration for one in found.points][1:]
    axes.plot(ends, geometry.steps, marker="o", color=COLOURS[0])
    axes.set_ylim(bottom=0.0, top=1.15 * float(geometry.steps.max()) or 1.0)
    axes.set_xlabel("iteration that the step ends at")
    axes.set_ylabel("length of the step", color=COLOURS[0])
    axes.set_title("Steps, and the angle to the next")
    if len(geometry.cosines):
        other = axes.twinx()
        other.plot(ends[:-1], geometry.cosines, marker="s", linestyle=":", color=COLOURS[1])
        other.set_ylim(-1.05, 1.05)
        other.grid(False)
        other.spines["right"].set_visible(True)
        other.set_ylabel("cosine", color=COLOURS[1])


def _decays(axes: Axes, found: Trajectory) -> None:
    at: dict[tuple[float, float], list[str]] = {}
    for one in found.decayed():
        place = round(100 * one.progress_kept, 1), round(100 * one.averaged_away, 1)
        at.setdefault(place, []).append(one.decay)
    for n, ((x, y), names) in enumerate(sorted(at.items())):
        axes.plot(x, y, MARKERS[n], color=COLOURS[n], markersize=11)
        left = x > sum(axes_x for axes_x, _ in at) / len(at)
        axes.annotate(
            ", ".join(names),
            (x, y),
            textcoords="offset points",
            xytext=(-11 if left else 11, 0),
            ha="right" if left else "left",
            va="center",
            fontsize=11,
        )
    drift, walk, jitter = found.variance.shares
    axes.set_xlabel("progress kept (% of the drift)")
    axes.set_ylabel("noise averaged away (%)")
    axes.margins(0.2)
    axes.set_title(f"Updates: {drift:.0%} drift, {walk:.0%} walk, {jitter:.0%} jitter")


def _some(count: int, always: list[int] | None = None) -> list[int]:
    """Places to name, evenly; the last one for certain."""
    step = -(-count // _NAMED)
    return sorted({*range(count - 1, -1, -step), *(always or ())})

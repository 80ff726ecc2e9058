"""The page's figures, from the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import Interval, interval
from examples.wsm_vs_wsd.tables import merge_name
from wsm_megatron.pictures.style import COLOURS, MARKERS

Points = list[tuple[float, Interval]]


def plot_all(r: Results, path: Path) -> None:
    """Six panels as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.6), layout="constrained")
    draws = (_plateau, _decays, _durations, _intervals, _distances, _too_early)
    for draw, axes in zip(draws, panels.flat, strict=True):
        draw(r, axes)
        axes.grid(alpha=0.3)
        if labels := axes.get_legend_handles_labels()[1]:
            _legend(axes, len(labels))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _legend(axes: Any, labels: int) -> None:
    """Of many lines above all of them."""
    if labels <= 4:
        axes.legend(fontsize=8)
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def _lines(axes: Any, series: Iterator[tuple[str, Points]]) -> None:
    """Means with 95 % intervals."""
    styles = [(c, m) for m, c in zip(MARKERS, COLOURS, strict=True)]
    for (label, points), (colour, marker) in zip(series, styles * 2, strict=False):
        if points:
            x = [at for at, _ in points]
            y = [value.mean for _, value in points]
            error = [value.half for _, value in points]
            axes.errorbar(x, y, yerr=error, label=label, color=colour, marker=marker, markersize=4,
                          linewidth=1.3, capsize=2)  # fmt: skip


def _present(pairs: list[tuple[float, Interval | None]]) -> Points:
    return [(x, value) for x, value in pairs if value is not None]


def _plateau(r: Results, axes: Any) -> None:
    def series() -> Iterator[tuple[str, Points]]:
        runs = {"main": r.profile.lr, "low": r.profile.second_lr}
        for run, lr in runs.items():
            curves = [arm["curve"] for arm in r.arms(run).values()]
            steps = list(curves[0]) if curves else []
            yield (
                f"constant LR {lr:g}",
                [(float(step), interval([curve[step] for curve in curves])) for step in steps[2:]],
            )

    _lines(axes, series())
    axes.set_title("The stable runs: is it a plateau?")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats a byte)")


def _decays(r: Results, axes: Any) -> None:
    p, stable = r.profile, names.stable("main", r.profile.steps)

    def series() -> Iterator[tuple[str, Points]]:
        for style in names.STYLES:
            found = [
                (float(w), r.difference(names.decay("main", style, w), stable)) for w in p.windows
            ]
            yield f"decay {style}", _present(found)
        for decay in names.DECAYS:
            found = [(float(w), r.difference(merge_name(r, decay, w), stable)) for w in p.windows]
            yield f"merge {decay}", _present(found)
        blocks = [
            (float(w), r.difference(names.blocks("main", "mean", w, p.interval, p.steps), stable))
            for w in p.windows
        ]
        yield "mean of block means", _present(blocks)

    _lines(axes, series())
    axes.set_title("Merge against decay at equal tokens")
    axes.set_xlabel("window (steps)")
    axes.set_ylabel("test loss − constant LR")


def _durations(r: Results, axes: Any) -> None:
    stable = names.stable("main", r.profile.steps)

    def series() -> Iterator[tuple[str, Points]]:
        for decay in ("mean", "ema"):
            yield (
                decay,
                _present(
                    [
                        (float(w), r.difference(merge_name(r, decay, w), stable))
                        for w in r.profile.durations
                    ]
                ),
            )

    _lines(axes, series())
    axes.set_xscale("log", base=2)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_title("Duration, at a fixed interval")
    axes.set_xlabel("window (steps)")
    axes.set_ylabel("test loss − constant LR")


def _intervals(r: Results, axes: Any) -> None:
    p, stable = r.profile, names.stable("main", r.profile.steps)

    def series() -> Iterator[tuple[str, Points]]:
        for window in p.windows[1:]:
            for decay in ("mean", "ema"):
                points: list[tuple[float, Interval | None]] = []
                for i in p.intervals(window):
                    merged = names.merged("main", decay, window, i, p.steps)
                    points.append((window / i + 1, r.difference(merged, stable)))
                yield f"{decay}, window {window}", _present(points)

    _lines(axes, series())
    axes.set_xscale("log", base=2)
    axes.set_title("Granularity, in a fixed window")
    axes.set_xlabel("points in the window")
    axes.set_ylabel("test loss − constant LR")


def _distances(r: Results, axes: Any) -> None:
    found = [one for one in r.records("distances") if one["style"] == "linear"]

    def series() -> Iterator[tuple[str, Points]]:
        for run, lr in (("main", r.profile.lr), ("low", r.profile.second_lr)):
            points = []
            for window in r.profile.windows:
                ones = [o["ratio"] for o in found if (o["run"], o["window"]) == (run, window)]
                points.append((float(window), interval(ones) if ones else None))
            yield f"LR {lr:g}", _present(points)

    _lines(axes, series())
    axes.set_ylim(bottom=0)
    axes.set_title("Distance of the mean from the linear decay")
    axes.set_xlabel("window (steps)")
    axes.set_ylabel("of the distance of the undecayed weights")


def _too_early(r: Results, axes: Any) -> None:
    p = r.profile
    points = [
        (float(end), r.difference(names.merged("main", "mean", p.middle, p.interval, end),
                                  names.stable("main", end)))
        for end in (*p.early_ends, p.steps)
    ]  # fmt: skip
    _lines(axes, iter([(f"mean over {p.middle}", _present(points))]))
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_title("Merging too early")
    axes.set_xlabel("end of the window (step)")
    axes.set_ylabel("test loss − constant LR there")

"""The demo's results as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One merge of the last ``num`` checkpoints that end at ``iteration``."""

    decay: str
    num: int
    iteration: int
    root: Path
    """The folder that holds ``iter_XXXXXXX``."""

    @property
    def name(self) -> str:
        return f"{self.decay} over {self.num}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """TaskAssignment-out losses in nats a byte."""

    trained: dict[int, float]
    """By iteration."""
    merged: dict[Merge, float]

    @property
    def last(self) -> int:
        return max(self.trained)


def table(results: Results) -> Iterator[str]:
    """Trained checkpoints first, then the merges that end at the last of them."""
    last = results.trained[results.last]
    yield f"{'checkpoint':<28}{'held-out loss':>14}{'against the last':>18}"
    yield "-" * 60
    for iteration, loss in results.trained.items():
        yield _row(f"trained, step {iteration}", loss, last)
    yield "-" * 60
    for merge, loss in results.merged.items():
        if merge.iteration == results.last:
            yield _row(f"merged, {merge.name}", loss, last)


def _row(name: str, loss: float, last: float) -> str:
    return f"{name:<28}{loss:>14.4f}{loss - last:>+18.4f}"


def plot(results: Results, path: Path) -> None:
    """Write the trained losses and the merges over training steps as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    axes.plot(
        list(results.trained),
        list(results.trained.values()),
        marker="o",
        markersize=3,
        color="0.45",
        label="trained, constant LR",
    )
    series: dict[str, list[tuple[int, float]]] = {}
    for merge, loss in results.merged.items():
        series.setdefault(merge.name, []).append((merge.iteration, loss))
    for (name, points), style in zip(series.items(), "s^Dvp", strict=False):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker=style, markersize=6, linestyle=":", label=f"merged, {name}")
    # The steep start would hide the differences that matter.
    shown = {step: loss for step, loss in results.trained.items() if step >= results.last / 4}
    lowest = min(*results.trained.values(), *results.merged.values())
    axes.set_xlim(left=min(shown) - 0.02 * results.last)
    axes.set_ylim(lowest - 0.03, max(shown.values()) + 0.03)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss (nats a byte)")
    axes.set_title("Merging the last checkpoints of a run at constant LR")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

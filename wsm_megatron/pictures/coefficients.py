"""What each checkpoint weighs, and the learning rate that this stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wsm_megatron.pictures.style import COLOURS, MARKERS, legend, new_figure, scaled
from wsm_megatron.schedule.coefficients import MergeCoefficients

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_coefficients(decays: Sequence[MergeCoefficients], names: Sequence[str] = ()) -> Figure:
    """Effective LR over the window, and below it the coefficients, of up to eight merges.

    Args:
        decays: in one unit. names: of the merges; by default those of their decays.
    """
    names = names or [one.decay or "weights" for one in decays]
    figure = new_figure(7.0)
    above, below = figure.subplots(2, 1, sharex=True)
    everywhere = [place for one in decays for place in one.positions]
    _, label = scaled(everywhere, decays[0].unit)
    largest = max(everywhere, key=abs)
    for n, (one, name) in enumerate(zip(decays, names, strict=True)):
        (*places, _), _ = scaled([*one.positions, largest], one.unit)
        style = {"color": COLOURS[n % len(COLOURS)], "label": name}
        _stairs(above, places, one.effective_lr, **style)
        below.plot(places, one.coefficients, marker=MARKERS[n % len(MARKERS)], **style)
    above.set_ylabel("effective LR\n(of the constant one)")
    above.set_ylim(bottom=min(0.0, above.get_ylim()[0]))
    above.set_title("The decay that a merge stands for, and what its checkpoints weigh")
    below.set_ylabel("coefficient")
    below.axhline(0.0, color="black", linewidth=0.8)
    below.set_xlabel(label)
    legend(above)
    return figure


def _stairs(axes: Axes, places: Sequence[float], effective: Sequence[float], **style: Any) -> None:
    """Constant between two checkpoints; one before the window."""
    before = places[0] - (places[-1] - places[0]) * 0.06
    edges = [before, *places]
    axes.stairs([1.0, *effective], edges, baseline=None, linewidth=2.0, **style)

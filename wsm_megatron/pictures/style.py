"""How every picture looks: size, letters, colours that also colour-blind readers can tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_megatron.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette, without its yellow, which no slide shows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#8C8C8C"
WIDTH, HEIGHT = 11.0, 6.2
"""Inches of a slide; at :data:`DPI` 1650 × 930."""
DPI = 150
FORMATS = (".png", ".svg")

_LOOK: Any = {
    "font.size": 13,
    "font.family": "sans-serif",
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "svg.hashsalt": "wsm",  # the same picture, the same bytes
}
_SCALES = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


@contextmanager
def drawing() -> Iterator[None]:
    """The look, for what is drawn and saved inside.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            f"pictures are drawn by matplotlib, which cannot be imported ({error}): "
            "pip install 'wsm_megatron[plot]'"
        ) from error
    with matplotlib.rc_context(_LOOK):
        yield


def new_figure(height: float = HEIGHT) -> Figure:
    """An empty slide; inside of :func:`drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def check_format(path: Path) -> None:
    """Raise ``UsageError`` for a file that is neither PNG nor SVG."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--out {path}: pictures are written as {' or '.join(FORMATS)}")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, as its suffix says."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".svg":
        path.write_text(as_svg(figure))
    else:
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def as_svg(figure: Figure) -> str:
    """An ``<svg>`` element that scales with the page; its letters are shapes."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)


def scaled(values: Sequence[float], unit: str) -> tuple[list[float], str]:
    """Positions in handy numbers, and the label of their axis."""
    if unit != "tokens":
        return [float(value) for value in values], "training iteration"
    largest = max(map(abs, values), default=0)
    for scale, name in _SCALES:
        if largest >= scale:
            return [value / scale for value in values], f"training tokens ({name})"
    return [float(value) for value in values], "training tokens"


def legend(axes: Axes, columns: int = 1) -> None:
    """Beside the picture, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns)


def short(name: str, most: int = 44) -> str:
    """A long name with its middle left out."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-half:]}"

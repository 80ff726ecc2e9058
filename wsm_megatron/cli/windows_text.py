"""Which windows a run affords, as lines."""

from __future__ import annotations

from collections.abc import Iterator

from wsm_megatron.cli.figures import known_tokens, size
from wsm_megatron.sweeps.windows import Affordable, Covered


def window_lines(found: Affordable) -> Iterator[str]:
    """What the windows of a job cover, and a table of others that end where they do."""
    for one in dict.fromkeys(found.covered):
        yield _covered(one)
    yield (
        f"a checkpoint takes {size(found.checkpoint_bytes)} on disk; {size(found.free)} are free, "
        f"for {found.more:,} more. A merge takes {size(found.memory)} of memory a rank, whatever "
        f"its window; --wsm-merge keeps {size(found.kept_bytes)} a checkpoint over all ranks"
    )
    yield (
        f"{'checkpoints':>16}  {'from iteration':>14}  {'iterations':>10}  {'tokens':>18}  "
        f"{'on disk':>9}  {'read':>9}  {'seconds':>8}"
    )
    for window in found.windows:
        seconds = "-" if window.seconds is None else f"{window.seconds:.1f}"
        yield (
            f"{window.count:>16}  {window.oldest:>14}  {window.iterations:>10,}  "
            f"{known_tokens(window.tokens):>18}  {size(window.stored):>9}  "
            f"{size(window.read):>9}  {seconds:>8}"
        )
    if found.read_rate is None:
        yield "too little to read to measure a rate by: it takes seconds"
    else:
        yield (
            f"seconds of reading on one rank, at the {size(found.read_rate)}/s measured here, as "
            "the files are now (in the page cache or not)"
        )


def _covered(one: Covered) -> str:
    asked = f"{one.asked} covers" if one.asked else "the window covers"
    line = (
        f"{asked} {one.count} checkpoints, iterations {one.oldest} to {one.newest}: "
        f"{one.span:,} {one.unit}"
    )
    return line if one.next_span is None else f"{line}; one more would make it {one.next_span:,}"

"""The command line that makes one merge of a sweep alone."""

from __future__ import annotations

import shlex
from pathlib import Path

from wsm_megatron.schedule.order import SCRAMBLED, SEQUENTIAL
from wsm_megatron.sweeps.manifest import SweptMerge


def merge_command(one: SweptMerge) -> str:
    """The command that makes a merge of a sweep alone."""
    sources = [Path(path) for path in one.sources]
    words = ["wsm", "merge"]
    if {path.parent for path in sources} == {sources[0].parent}:
        iterations = ",".join(map(str, one.iterations))
        words += ["--load", str(sources[0].parent), "--iterations", iterations]
    else:
        words += [word for path in sources for word in ("--source", str(path))]
    words += ["--save", "OUT"]
    if one.decay is None:
        return shlex.join([*words, "--weights", ",".join(map(repr, one.coefficients))])
    words += ["--decay", one.decay]
    if one.min_decay:
        words += ["--min-decay", repr(one.min_decay)]
    if one.order != SEQUENTIAL:
        words += ["--order", one.order]
    if one.order == SCRAMBLED and one.order_seed:
        words += ["--order-seed", str(one.order_seed)]
    return shlex.join(words)

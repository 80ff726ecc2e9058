"""``wsm list``: the merges below a folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.options import local_path, typed
from wsm_megatron.sweeps.listing import ListedMerge, list_merges


def add_list(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "list", _list, help)
    command.add_argument("root", type=typed(local_path), help="a --save folder, or one above some")


def _list(arguments: argparse.Namespace) -> Answer:
    root = arguments.root
    found = list_merges(root)
    data = {"root": str(root)}
    return Answer(
        _lines(root, found),
        lambda: data | {"merges": [one.as_data() for one in found]},
        shown=True,
    )


def _lines(root: Path, found: Sequence[ListedMerge]) -> Iterator[str]:
    if not found:
        yield f"{root}: no merged checkpoint"
        return
    metrics = list(dict.fromkeys(name for one in found for name in one.scores or ()))
    names = [str(one.path.relative_to(root)) for one in found]
    width = max(map(len, names))
    heads = "".join(f"{name:>12.12}" for name in metrics)
    yield (
        f"{'merge':{width}}  {'sources':>7}  {'iterations':>19}  {'decay':>12}  {'optimizer':>9}  "
        f"{'by':>8}  {'version':>9}{heads}"
    )
    for one, name in zip(found, names, strict=True):
        if one.problem is not None:
            yield f"{name:{width}}  {one.problem}"
            continue
        where = f"{one.iterations[0]}-{one.iterations[-1]}"
        decay = Path(one.decay).stem if one.decay else "weights"
        values = [(one.scores or {}).get(metric) for metric in metrics]
        scores = "".join(f"{'-' if v is None else format(v, '.6g'):>12}" for v in values)
        yield (
            f"{name:{width}}  {len(one.iterations):>7}  {where:>19}  {decay:>12.12}  "
            f"{one.optimizer_state:>9}  {one.made:>8}  {one.version:>9}{scores}"
        )

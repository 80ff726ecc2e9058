"""docs/compatibility.md, made of the recorded results: no cell by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence

from tests.megatron_lm.checkout import REPOSITORY
from tests.megatron_lm.matrix.cell import CANNOT_RUN, FAILED, PASSED, REFUSED
from tests.megatron_lm.matrix.records import Record
from tests.megatron_lm.matrix.table import (
    ACROSS,
    ACROSS_ROWS,
    COLUMNS,
    CONFIGURATIONS,
    RESUME,
    VERSIONS,
    Configuration,
)

FILE = REPOSITORY / "docs" / "compatibility.md"
Recorded = Mapping[tuple[str, str, str, str], Record]

SIGNS = {PASSED: "✓", REFUSED: "r", CANNOT_RUN: "–", FAILED: "✗"}
_NOT_RUN = "·"

TOP = """\
# Compatibility

Versions of Megatron-LM and configurations of a run that `wsm_megatron` was run with. Made by
`python -m tests.megatron_lm.matrix` from what that recorded, no cell by hand
(`tests/megatron_lm/matrix/results.jsonl`). A short column of it, on plain megatron-core, is tested
with every change (`tests/dist`).

A run has two layers, hidden size 32 and eight iterations, on CPU ranks that talk by gloo. A cell
has three signs:

1. **plugin**: the run with `--wsm-merge` has the losses of the run without it, and both checkpoints
   that it merges equal an independent float64 sum over the run's own, bit for bit.
2. **offline**: so does `wsm merge` of the run's checkpoints, and it equals the plugin's.
3. **resume**: that version of Megatron-LM loads the merge (the plugin's, where the offline one is
   refused), and a step with LR 0 moves neither weights nor main params; `wsm resume-check` says so
   before.

| sign | |
|---|---|
| ✓ | passed |
| r | refused, with the message below |
| – | cannot run here: without this package Megatron-LM ends with the message below |
| ✗ | failed |
| · | not run |
"""

CUDA = """\
Instead of CUDA, Apex and Transformer Engine all launches have `tests/megatron_lm/standin.py`: CUDA
calls are answered by the CPU, and `FusedAdam` is AdamW written in torch, with that class's state.
Ranks are forked from a process that has imported Megatron-LM. Some rows and versions have more:
"""


def render(recorded: Recorded) -> str:
    """The page."""
    parts = [TOP, "## Versions\n", _versions(recorded), "## Results\n", _results(recorded)]
    parts += ["## Resumed by another version\n", _across(recorded)]
    parts += ["## What was not passed, and why\n", _reasons(recorded)]
    parts += ["## Stand-ins\n", CUDA, _standins()]
    parts += ["## Configurations\n", _configurations()]
    return "\n".join(parts)


def _versions(recorded: Recorded) -> str:
    rows = []
    for version in VERSIONS:
        found = [one for one in recorded.values() if one.version == version.name]
        found = [one for one in found if not one.resumed_by]
        passed = sum(one.result == PASSED for one in found)
        rows.append(
            (
                version.name,
                _few(one.megatron for one in found),
                _span(one.date for one in found),
                _few(one.wsm for one in found),
                f"{passed} of {len(found)}",
            )
        )
    head = ("Megatron-LM core", "commit", "run on", "wsm_megatron", "cells passed")
    return _table(head, rows)


def _results(recorded: Recorded) -> str:
    head = ("", *(version.name for version in VERSIONS))
    rows = []
    for one in CONFIGURATIONS:
        cells = [
            " ".join(
                _sign(recorded.get((version.name, "", one.name, column))) for column in COLUMNS
            )
            for version in VERSIONS
        ]
        rows.append((one.name, *cells))
    return _table(head, rows)


def _across(recorded: Recorded) -> str:
    head = ("trained and saved by", "resumed by", *ACROSS_ROWS)
    rows = [
        (source, target, *(_sign(recorded.get((source, target, n, RESUME))) for n in ACROSS_ROWS))
        for source, target in ACROSS
    ]
    return _table(head, rows)


def _reasons(recorded: Recorded) -> str:
    """Every other result once, with the cells that have it."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    order = {version.name: number for number, version in enumerate(VERSIONS)}
    rows = {one.name: number for number, one in enumerate(CONFIGURATIONS)}

    def place(one: Record) -> tuple[int, int, str]:
        return rows.get(one.row, -1), order.get(one.version, -1), one.resumed_by

    for one in sorted(recorded.values(), key=place):
        if one.result != PASSED and one.row in rows:
            what = f"{one.version} to {one.resumed_by}" if one.resumed_by else one.version
            cells.setdefault((one.row, one.result, one.reason), []).append(f"{what} {one.column}")
    head = ("configuration", "", "cells", "message")
    return _table(
        head,
        [
            (row, SIGNS[result], ", ".join(_grouped(found)), f"`{_plain(reason)}`")
            for (row, result, reason), found in cells.items()
        ],
    )


def _grouped(cells: Sequence[str]) -> list[str]:
    """``0.16.1 plugin``, ``0.16.1 offline`` as ``0.16.1 plugin + offline``."""
    columns: dict[str, list[str]] = {}
    for cell in cells:
        version, _, column = cell.rpartition(" ")
        columns.setdefault(version, []).append(column)
    return [
        version if len(found) == len(COLUMNS) else f"{version} {' + '.join(found)}"
        for version, found in columns.items()
    ]


def _standins() -> str:
    rows = []
    names = {name for one in (*CONFIGURATIONS, *VERSIONS) for name in one.standins}
    for name in sorted(names):
        users = [one.name for one in (*VERSIONS, *CONFIGURATIONS) if name in one.standins]
        rows.append((f"`{name}`", ", ".join(users), _says(name)))
    return _table(("`tests/megatron_lm/standins`", "used by", ""), rows)


def _says(name: str) -> str:
    """The module's own words, on one line."""
    module = importlib.import_module(f"tests.megatron_lm.standins.{name}")
    return _plain(" ".join((module.__doc__ or "").replace("``", "`").split()))


def _configurations() -> str:
    return _table(("", "ranks", "flags beside the model's"), map(_described, CONFIGURATIONS))


def _described(one: Configuration) -> tuple[str, str, str]:
    flags = [one.flags, *(f"(where known: {more})" for more in one.where_known)]
    flags += [f"(without {more})" for more in one.without]
    if one.state != "last":
        flags.append(f"(merged with --optimizer-state {one.state})")
    if "samples" in one.train:
        flags.append(one.train)
    if one.script != "pretrain_gpt.py":
        flags.append(f"({one.script})")
    return one.name, str(one.nproc), f"`{_plain(' '.join(flags))}`"


def _sign(record: Record | None) -> str:
    return _NOT_RUN if record is None else SIGNS[record.result]


def _few(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in sorted(set(values))) or _NOT_RUN


def _span(dates: Iterable[str]) -> str:
    found = sorted(dates)
    if not found:
        return _NOT_RUN
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _plain(text: str) -> str:
    return text.replace("|", r"\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

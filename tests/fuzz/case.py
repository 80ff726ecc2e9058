"""One input: a copy of a real run, and the mutations that change it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests import runs
from tests.reference import RUNS

ITERATIONS = (6, 8)
WEIGHTS = (0.25, 0.75)
BASES = (
    *[(runs.DENSE, "drop")] * 4,  # the smallest
    (runs.FLAT, "drop"),
    (runs.FLAT, "last"),
    (runs.FULLY, "last"),
    (runs.FP32_PARAM, "last"),
    (runs.MAIN, "last"),
    (runs.MAIN, "drop"),
    (runs.MOE, "drop"),
)
"""Runs of both formats and all layouts of the optimizer, and ``--optimizer-state``."""


@dataclass
class Case:
    """A run that may be changed, in a folder of its own."""

    folder: Path
    base: str
    optimizer_state: str
    victim: Path
    """The checkpoint that is changed: the newest, or the one before."""
    chance: Random
    kinds: list[str] = field(default_factory=list)
    silent: bool = False
    """Whether bytes were changed behind the back of their CRC-32: such must not be merged."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def target(self) -> Path:
        return self.folder / "out"


Mutation = Callable[[Case], None]


@dataclass(frozen=True)
class Kind:
    name: str
    mutate: Mutation
    silent: bool


KINDS: dict[str, Kind] = {}


def kind(name: str, silent: bool = False) -> Callable[[Mutation], Mutation]:
    """Register a mutation under ``part: what``."""

    def register(mutate: Mutation) -> Mutation:
        KINDS[name] = Kind(name, mutate, silent)
        return mutate

    return register


def copy_base(name: str, run: Path) -> None:
    for iteration in ITERATIONS:
        path = runs.checkpoint(name, iteration)
        shutil.copytree(path, run / path.name)
    (run / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS[-1]))


def make_case(seed: int, folder: Path, only: str = "") -> Case:
    """The input of a seed; kinds take turns, so that few seeds have all of them."""
    chance = Random(seed)
    base, optimizer_state = chance.choice(BASES)
    case = Case(
        folder,
        base,
        optimizer_state,
        runs.checkpoint(folder / "run", chance.choice(ITERATIONS)),
        chance,
    )
    copy_base(base, case.run)
    kinds = [one for name, one in sorted(KINDS.items()) if only in name]
    chosen = [kinds[seed % len(kinds)]]
    if seed % 5 == 4:  # first one that leaves tensors and .metadata alone
        beside = [one for one in kinds if one.name.startswith(("side", "run", "common", "json"))]
        chosen[:0] = chance.sample(beside, min(1, len(beside)))
    for one in chosen:
        case.kinds.append(one.name)
        case.silent |= one.silent
        one.mutate(case)
    return case


def base_checkpoint(case: Case, iteration: int) -> Path:
    return runs.checkpoint(case.base, iteration)


assert RUNS.is_dir()

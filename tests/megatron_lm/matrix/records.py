"""Results of cells, a JSON line each, appended as they come: the newest of a cell counts."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tests.megatron_lm.checkout import REPOSITORY
from tests.megatron_lm.matrix.table import BY_NAME, Configuration

FILE = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell's result.

    Attributes:
        version: of Megatron-LM that trained the run.
        resumed_by: the version that resumed, where that is another one; empty otherwise.
        row, column: names in :mod:`.table`.
        flags: digest of the configuration as it was run.
        result, reason: see :mod:`.cell`.
        standins: used beyond the stand-in for CUDA.
        date: of the run, UTC, ISO 8601.
        seconds: of the whole row.
        megatron, wsm: commits; ``wsm`` is the last one that changed the package, with ``+`` where
            it had changes that were not committed.
    """

    version: str
    resumed_by: str = ""
    row: str
    column: str
    flags: str
    result: str
    reason: str
    standins: tuple[str, ...]
    date: str
    seconds: float
    megatron: str
    wsm: str

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return self.version, self.resumed_by, self.row, self.column


def read(file: Path = FILE) -> dict[tuple[str, str, str, str], Record]:
    """The newest record of every cell."""
    return {record.cell: record for record in _lines(file)}


def append(records: Iterable[Record], file: Path = FILE) -> None:
    with file.open("a", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(asdict(record)) + "\n")


def compact(file: Path = FILE) -> None:
    """Leave the newest record of every cell that is in the table."""
    newest = {cell: record for cell, record in read(file).items() if record.row in BY_NAME}
    lines = [json.dumps(asdict(newest[cell])) + "\n" for cell in sorted(newest)]
    file.write_text("".join(lines), encoding="utf-8")


def digest(configuration: Configuration) -> str:
    """Of what a row runs: another one is another row. Of what is not said there is nothing in it:
    an attribute that is new changes no row without it."""
    said = [
        (one.name, value)
        for one in fields(configuration)
        if (value := getattr(configuration, one.name)) not in (one.default, {})
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:8]


def commit_of(tree: Path) -> str:
    """The commit that a checkout is at."""
    return _git(tree, "rev-parse", "--short=12", "HEAD")


def commit_of_package() -> str:
    """The last commit that changed wsm_megatron; ``+`` where files of it have changed since."""
    commit = _git(REPOSITORY, "log", "-1", "--format=%h", "--abbrev=12", "--", "wsm_megatron")
    changed = _git(REPOSITORY, "status", "--porcelain", "--", "wsm_megatron")
    return f"{commit}+" if changed else commit


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _lines(file: Path) -> Iterator[Record]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        yield Record(**{**values, "standins": tuple(values["standins"])})

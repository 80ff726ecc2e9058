"""``python -m tests.megatron_lm.matrix --trees DIR``: run the table, write docs/compatibility.md.

DIR holds a checkout of Megatron-LM for each version, in folders of the versions' names. A row that
was run at the same commits with the same flags is not run again.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from tests.megatron_lm.checkout import REPOSITORY, Outcome, prepare
from tests.megatron_lm.matrix import across, page, records
from tests.megatron_lm.matrix.cell import FAILED, Result, Row
from tests.megatron_lm.matrix.ranks import Ranks
from tests.megatron_lm.matrix.records import Record
from tests.megatron_lm.matrix.table import (
    ACROSS,
    ACROSS_ROWS,
    BY_NAME,
    COLUMNS,
    CONFIGURATIONS,
    RESUME,
    VERSIONS,
    Configuration,
    Version,
)

_VERSIONS = {version.name: version for version in VERSIONS}
Job = tuple[Version, Configuration, str]
"""Version and row; the version that resumes, empty for a row of its own."""


def main() -> None:
    """Run what is not recorded yet, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.megatron_lm.matrix", description=__doc__)
    parser.add_argument("--trees", type=Path, help="folder with a checkout for each version")
    parser.add_argument("--only", help="rows, separated by commas; 'core' or 'across'")
    parser.add_argument("--versions", help="separated by commas (all)")
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--missing", action="store_true", help="only cells without a record")
    parser.add_argument("--failed", action="store_true", help="also what is recorded as failed")
    parser.add_argument("--results", type=Path, default=records.FILE)
    parser.add_argument("--logs", type=Path, help="folder for the logs of failed rows")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.trees is not None:
        _run(args)
    records.compact(args.results)
    page.FILE.write_text(page.render(records.read(args.results)), encoding="utf-8")
    print(f"wrote {page.FILE.relative_to(REPOSITORY)}")


def _run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        table = _Table(args, Path(folder))
        try:
            table.run(_jobs(args))
        finally:
            table.close()


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    wanted = args.versions.split(",") if args.versions else list(_VERSIONS)
    rows = _rows(args.only)
    for core in (True, False):
        for version in VERSIONS:
            for one in rows:
                if one.core == core and version.name in wanted:
                    yield version, one, ""
    if args.only in (None, "across"):
        for source, target in ACROSS:
            for name in ACROSS_ROWS:
                if target in wanted:
                    yield _VERSIONS[source], BY_NAME[name], target


def _rows(only: str | None) -> Sequence[Configuration]:
    if only is None:
        return CONFIGURATIONS
    names = only.split(",")
    return [one for one in CONFIGURATIONS if one.name in names or (one.core and "core" in names)]


class _Table:
    """Checkouts, the processes that fork their ranks, and what is recorded."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder = args, folder
        self._wsm = records.commit_of_package()
        self._trees: dict[str, Path] = {}
        self._ranks: tuple[tuple[str, ...], Ranks] | None = None

    def run(self, jobs: Iterator[Job]) -> None:
        todo = [job for job in jobs if self._is_there(job) and not self._is_done(job)]
        begin = time.monotonic()
        for number, (version, one, target) in enumerate(todo):
            started = time.monotonic()
            found = self._across(version, one, target) if target else self._row(version, one)
            seconds = round(time.monotonic() - started, 1)
            records.append(
                [
                    self._record(version, one, target, column, result, seconds)
                    for column, result in found.items()
                ],
                self._args.results,
            )
            left = (time.monotonic() - begin) / (number + 1) * (len(todo) - number - 1)
            shown = ", ".join(f"{column} {result.status}" for column, result in found.items())
            print(
                f"[{number + 1}/{len(todo)}] {version.name} {target and f'→ {target} '}{one.name}: "
                f"{shown} ({seconds:.0f} s; about {left / 60:.0f} min left)",
                flush=True,
            )

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks[1].close()

    def _is_there(self, job: Job) -> bool:
        names = [job[0].name, job[2] or job[0].name]
        return all((self._args.trees / name / "pretrain_gpt.py").exists() for name in names)

    def _is_done(self, job: Job) -> bool:
        version, one, target = job
        if self._args.again:
            return False
        recorded = records.read(self._args.results)
        for column in (RESUME,) if target else COLUMNS:
            record = recorded.get((version.name, target, one.name, column))
            commit = records.commit_of(self._args.trees / (target or version.name))
            wanted = (commit, self._wsm, records.digest(one))
            found = record and (record.megatron, record.wsm, record.flags)
            if record is None or (found != wanted and not self._args.missing):
                return False
            if self._args.failed and record.result == FAILED:
                return False
        return True

    def _row(self, version: Version, one: Configuration) -> dict[str, Result]:
        folder = self._empty("row")
        row = Row(version, one, self._tree(version), folder, self._launcher(version, one))
        found = row.results()
        if self._args.logs and any(result.status == FAILED for result in found.values()):
            self._args.logs.mkdir(parents=True, exist_ok=True)
            for name, log in row.logs.items():
                (self._args.logs / f"{version.name}-{one.name}-{name}.log").write_text(log)
        return found

    def _across(self, version: Version, one: Configuration, target: str) -> dict[str, Result]:
        run = self._folder / "runs" / f"{version.name}-{one.name}"
        if not run.exists():
            launch = self._launcher(version, one)
            across.train(version, one, self._tree(version), run, launch)
        other = _VERSIONS[target]
        launch = self._launcher(other, one)
        folder = self._empty("across")
        return {RESUME: across.resume(other, one, self._tree(other), run, folder, launch)}

    def _launcher(self, version: Version, one: Configuration):  # type: ignore[no-untyped-def]
        def launch(flags: str, **options: object) -> Outcome:
            return self._forking(version, one).launch(flags, **options)  # type: ignore[arg-type]

        return launch

    def _forking(self, version: Version, one: Configuration) -> Ranks:
        key = (version.name, one.script, *version.standins, *one.standins, *map("=".join, one.env))
        if self._ranks is None or self._ranks[0] != key:
            self.close()
            standins = (*version.standins, *one.standins)
            self._ranks = key, Ranks(self._tree(version), standins, one.script, dict(one.env))
        return self._ranks[1]

    def _tree(self, version: Version) -> Path:
        if version.name not in self._trees:
            folder = self._folder / "trees" / version.name
            self._trees[version.name] = prepare(self._args.trees / version.name, folder)
        return self._trees[version.name]

    def _empty(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _record(
        self,
        version: Version,
        one: Configuration,
        target: str,
        column: str,
        result: Result,
        seconds: float,
    ) -> Record:
        standins = {*version.standins, *one.standins}
        if target:
            standins |= {*_VERSIONS[target].standins}
        return Record(
            version=version.name,
            resumed_by=target,
            row=one.name,
            column=column,
            flags=records.digest(one),
            result=result.status,
            reason=result.reason,
            standins=tuple(sorted(standins)),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            seconds=seconds,
            megatron=records.commit_of(self._args.trees / (target or version.name)),
            wsm=self._wsm,
        )


if __name__ == "__main__":
    main()

"""docs/compatibility.md is what was recorded, of rows and versions that are in the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.megatron_lm.matrix import page, records
from tests.megatron_lm.matrix.cell import FAILED, PASSED
from tests.megatron_lm.matrix.records import Record
from tests.megatron_lm.matrix.table import ACROSS, BY_NAME, COLUMNS, CONFIGURATIONS, VERSIONS


def test_the_page_is_current() -> None:
    written = page.FILE.read_text(encoding="utf-8")
    assert written == page.render(records.read()), "python -m tests.megatron_lm.matrix"


def test_rows_have_names_of_their_own() -> None:
    assert len(BY_NAME) == len(CONFIGURATIONS)
    for one in CONFIGURATIONS:
        assert set(one.refuses) <= set(COLUMNS)


def test_what_is_recorded_is_in_the_table() -> None:
    names = {version.name for version in VERSIONS}
    for record in records.read().values():
        assert record.version in names and record.row in BY_NAME and record.column in COLUMNS
        assert not record.resumed_by or (record.version, record.resumed_by) in ACROSS
        assert (record.result == PASSED) == (record.reason == "")


RECORD = Record(
    version="main",
    row="dp2",
    column="plugin",
    flags="0",
    result=PASSED,
    reason="",
    standins=(),
    date="2026-01-01",
    seconds=1.0,
    megatron="a",
    wsm="b",
)


def test_the_newest_record_of_a_cell_counts(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    failed = replace(RECORD, result=FAILED, reason="a message | of two parts")
    across = replace(RECORD, version="0.19.0", resumed_by="main", column="resume")
    records.append([failed, across], file)
    records.append([RECORD], file)
    assert records.read(file) == {RECORD.cell: RECORD, across.cell: across}
    records.compact(file)
    assert len(file.read_text().splitlines()) == 2
    records.append([failed], file)
    shown = page.render(records.read(file))
    assert r"a message \| of two parts" in shown and "| dp2 | ✗ | main plugin |" in shown

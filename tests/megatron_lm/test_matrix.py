"""The rows of the table for this checkout: exact merges, losses as without the plugin, resumes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.megatron_lm.matrix.cell import CANNOT_RUN, PASSED, REFUSED, Row
from tests.megatron_lm.matrix.ranks import Ranks
from tests.megatron_lm.matrix.table import BY_NAME, VERSIONS, Version


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row(megatron: Path, tmp_path: Path, name: str) -> None:
    version, one = version_of(megatron), BY_NAME[name]
    ranks = Ranks(megatron, (*version.standins, *one.standins), one.script, dict(one.env))
    try:
        found = Row(version, one, megatron, tmp_path, ranks.launch).results()
    finally:
        ranks.close()
    ran = {column: result for column, result in found.items() if result.status != CANNOT_RUN}
    for column, result in ran.items():
        expected = REFUSED if column in one.refuses else PASSED
        assert result.status == expected, f"{column}: {result.reason}"
        assert one.refuses.get(column, "") in result.reason
    if not ran:
        pytest.skip(next(iter(found.values())).reason)


def version_of(megatron: Path) -> Version:
    """The table's version that this checkout is, or the newest where it is none."""
    info = (megatron / "megatron" / "core" / "package_info.py").read_text()
    numbers = re.search(r"MAJOR = (\d+)\s+MINOR = (\d+)", info)
    assert numbers is not None
    minor = f"{numbers[1]}.{numbers[2]}."
    return next((one for one in VERSIONS if one.name.startswith(minor)), VERSIONS[-1])

"""docs/evidence.md is what the committed data says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.wsm_vs_wsd.page import write_page
from examples.wsm_vs_wsd.plan import plan
from examples.wsm_vs_wsd.results import Results

ROOT = Path(__file__).resolve().parents[2]
DATA = json.loads((ROOT / "examples" / "wsm_vs_wsd" / "data" / "hour.json").read_text())


def test_the_page_is_made_from_the_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = write_page(DATA, tmp_path).read_text()
    assert made == (ROOT / "docs" / "evidence.md").read_text()
    assert (tmp_path / "evidence.png").stat().st_size > 100_000


def test_the_data_is_of_all_arms_and_says_where_it_comes_from() -> None:
    results = Results(DATA)
    assert {arm.name for arm in plan(results.profile)} == DATA["arms"].keys()
    for run in DATA["runs"]:
        assert not run["uncommitted"] and re.fullmatch("[0-9a-f]{40}", run["commit"])
        assert run["command"] and run["hardware"]["cores"] and run["versions"]["megatron-core"]
    assert all(arm.get("same_bits") is not False for arm in DATA["arms"].values())

"""Whoever merges on the slow path is told so, and why."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig, kernels, merge


@pytest.mark.parametrize("built", [True, False])
def test_without_the_extension_a_merge_says_that_it_is_slow(
    built: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built:
        monkeypatch.setattr(
            kernels, "_path", lambda _: (kernels.reference.bind, "eager: not built")
        )
    with caplog.at_level(logging.WARNING, logger="wsm_megatron"):
        merge(MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out", last=2))
    told = [message for message in caplog.messages if "several times slower: not built" in message]
    assert len(told) == (not built)

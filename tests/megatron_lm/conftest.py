"""The checkout that these tests run, prepared once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.megatron_lm.checkout import prepare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.megatron_lm)
            if "MEGATRON_LM_DIR" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="MEGATRON_LM_DIR is not set"))


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout in MEGATRON_LM_DIR, with what it lacks to run here."""
    return prepare(Path(os.environ["MEGATRON_LM_DIR"]), tmp_path_factory.mktemp("megatron-lm"))

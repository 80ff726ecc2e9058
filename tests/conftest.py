"""Which tests share a worker of pytest-xdist, where scripts/test.sh uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

SLURM = Path(__file__).parent / "slurm"

settings.register_profile("wsm", deadline=None)  # machines differ: no test may be timed
settings.load_profile("wsm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group comes first; what follows fills the other worker."""
    items.sort(key=lambda item: not item.path.is_relative_to(SLURM))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker for a file, whose tests share what they set up, and one for all of tests/slurm.

    Two clusters at once would number their jobs alike, and so give them the same ports.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return Scheduling(config, log)

"""The cluster, started once a session where Slurm is installed."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs

REPOSITORY = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_programs()
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason=f"Slurm is not installed: no {', '.join(missing)}")
                )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of four cores. Jobs find this repository and this interpreter."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        cluster.environ |= {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "PATH": f"{Path(sys.executable).parent}:{cluster.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": folder,  # torchrun leaves a folder behind
        }
        yield cluster

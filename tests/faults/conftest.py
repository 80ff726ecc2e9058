"""Processes for ranks, cheap enough to kill by the dozen."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    """Processes forked from one that has imported torch and the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.rank"])
        first = context.Process(target=int)
        first.start()
        first.join()
    return context

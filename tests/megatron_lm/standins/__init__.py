"""What large runs train with and a CPU has not got: each module stands in for one of them.

Selected by ``STANDINS=fused_adam,fp8_tensor`` in the environment of a launch; every rank, and every
process that a rank spawns, calls ``install()`` of each, before the script starts. Each says what it
replaces and what of the real one it keeps; its arithmetic has tests of its own
(``tests/unit/plugin/test_standins.py``).
"""

from __future__ import annotations

import importlib


def install(names: str) -> None:
    """Install the stand-ins of these names, separated by commas."""
    for name in names.split(","):
        importlib.import_module(f"{__name__}.{name}").install()

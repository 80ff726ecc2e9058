"""Makes NVIDIA's Emerging-Optimizers (Muon) run on Python 3.11: nothing of it is replaced.

The checkout is named by ``EMERGING_OPTIMIZERS_DIR``.
"""

from __future__ import annotations

import os
import sys


def install() -> None:
    """Before Megatron's optimizers are imported, which look for it."""
    sys.path.append(os.environ["EMERGING_OPTIMIZERS_DIR"])

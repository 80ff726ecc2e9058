"""Cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from wsm_megatron.process.control_groups import own_groups


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, and within the CPU quota of its control groups, such as a
    pod's limit; at least 1.

    Args:
        root: where ``proc`` and ``sys`` are; another one in tests.
    """
    quotas = (_quota(*group) for group in own_groups("cpu", root))
    cores = [quota for quota in quotas if quota is not None]
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *cores])))


def _quota(folder: Path, is_v2: bool) -> float | None:
    """In cores; None where the group has no limit, or is not seen from here."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)

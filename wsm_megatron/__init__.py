"""WSM for Megatron: the effect of learning-rate decay by merging checkpoints (arXiv 2507.17634)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wsm_megatron.version import __version__ as __version__

if TYPE_CHECKING:
    from wsm_megatron.api import MergeReport, merge
    from wsm_megatron.config import ExecutionOptions, MergeConfig
    from wsm_megatron.errors import MergeError, UsageError
    from wsm_megatron.inspection.verify import VerifyReport, verify
    from wsm_megatron.plugin import WSM, WSMConfig, install, uninstall
    from wsm_megatron.schedule.decay import coefficients, effective_lr
    from wsm_megatron.sweeps.grid import Sweep, SweepGrid
    from wsm_megatron.sweeps.run import SweepOptions, sweep
    from wsm_megatron.sweeps.search import SearchOptions
    from wsm_megatron.sweeps.search_run import search


__all__ = [
    "WSM",
    "ExecutionOptions",
    "MergeConfig",
    "MergeError",
    "MergeReport",
    "SearchOptions",
    "Sweep",
    "SweepGrid",
    "SweepOptions",
    "UsageError",
    "VerifyReport",
    "WSMConfig",
    "coefficients",
    "effective_lr",
    "install",
    "merge",
    "search",
    "sweep",
    "uninstall",
    "verify",
]

_HOMES = {
    "config": ("ExecutionOptions", "MergeConfig"),
    "schedule.decay": ("coefficients", "effective_lr"),
    "api": ("MergeReport", "merge"),
    "inspection.verify": ("VerifyReport", "verify"),
    "sweeps.grid": ("Sweep", "SweepGrid"),
    "sweeps.run": ("SweepOptions", "sweep"),
    "sweeps.search": ("SearchOptions",),
    "sweeps.search_run": ("search",),
    "errors": ("MergeError", "UsageError"),
    "plugin": ("WSM", "WSMConfig", "install", "uninstall"),
}


def __getattr__(name: str) -> Any:
    """A public name, from its module: the command need not import the plugin."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"wsm_megatron.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

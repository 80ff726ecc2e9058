"""Signals that a rank sends itself at a chosen call of the plugin, to test what survives them."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any


def install(fault: str) -> None:
    """``RANK SIGNAL MODULE NAME N``: at its N-th call of plugin function ``NAME`` the rank sends
    itself the signal, before the call goes on."""
    rank, name, module, path, number = fault.split()
    if os.environ["RANK"] != rank:
        return
    owner: Any = importlib.import_module(f"wsm_megatron.plugin.{module}")
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, attribute), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    setattr(owner, attribute, faulty)

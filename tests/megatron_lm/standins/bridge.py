"""What Megatron-Bridge imports at its start and a CPU lacks, for the modules of Bridge alone.

Megatron-core still finds none of it, and takes its own ways without.

- ``transformer_engine``, ``timm``, ``open_clip``, ``qwen_vl_utils``: only looked at when the models
  of other families are registered.
- ``modelopt``: its adjustment of shapes for distillation answers None, as for a plain model.
- ``nvidia_resiliency_ext``: for the type of one argument; saves use megatron-core's own strategy.
"""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any
from unittest.mock import MagicMock

_ABSENT = ("transformer_engine", "timm", "open_clip", "qwen_vl_utils", "modelopt")


class _Absent(MagicMock):
    """A module of which every capitalised name is a class of its own."""

    __version__ = "2.0.0"

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            return super().__getattr__(name)
        found = type(name, (), {})
        setattr(self, name, found)
        return found


def install() -> None:
    """Call once a process, before anything of megatron is imported."""
    extension = types.ModuleType("nvidia_resiliency_ext")
    extension.__version__ = "0.0.0"  # type: ignore[attr-defined]  # too old for any use
    extension.__path__ = []
    inprocess: Any = types.ModuleType("nvidia_resiliency_ext.inprocess")
    inprocess.CallWrapper = object
    extension.inprocess = inprocess  # type: ignore[attr-defined]
    sys.modules |= {extension.__name__: extension, inprocess.__name__: inprocess}
    original = builtins.__import__

    def imported(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        importer = (globals or {}).get("__name__", "")
        if not level and importer.startswith("megatron.bridge") and name.split(".")[0] in _ABSENT:
            return _Absent(name=name)
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = imported


def leave_shapes_alone() -> None:
    """Once Bridge is imported: a plain model has no shapes to adjust."""
    from megatron.bridge.training import eval as evaluation
    from megatron.bridge.training import train

    for module in (evaluation, train):
        module.get_tensor_shapes_adjust_fn_for_distillation = lambda *_, **__: None

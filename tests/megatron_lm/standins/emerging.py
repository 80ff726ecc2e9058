"""Emerging-Optimizers itself (Muon and its kin), from a checkout in ``EMERGING_OPTIMIZERS_DIR``
(v0.4.0 fits main of August 2026).

Nothing of it is replaced but ``absl.logging``, by silence. It is written for Python 3.12:
before that, type parameters are read past, and annotations are not evaluated.
"""

from __future__ import annotations
import __future__ as future

import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from typing import Any

_PACKAGE = "emerging_optimizers"
_TYPE_PARAMETERS = re.compile(rb"^(\s*(?:def|class) \w+)\[[^\]\n]*\]", re.MULTILINE)


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        source = _TYPE_PARAMETERS.sub(rb"\1", data)
        return compile(source, path, "exec", future.annotations.compiler_flag, True, _optimize)

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder:
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None:
            return spec
        places = spec.submodule_search_locations
        loader = _Loader(name, spec.origin)
        return importlib.util.spec_from_file_location(
            name, spec.origin, loader=loader, submodule_search_locations=places
        )


class _Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def install() -> None:
    """Before Megatron's optimizers are imported, which look for it."""
    absl: Any = types.ModuleType("absl")
    absl.logging = _Quiet()
    sys.modules.setdefault("absl", absl)
    sys.path.append(os.environ["EMERGING_OPTIMIZERS_DIR"])
    if sys.version_info < (3, 12):
        sys.meta_path.insert(0, _Finder())

"""Imports point one way: the order in which the packages may be read, from the top down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import wsm_megatron

ROOT = Path(wsm_megatron.__file__).parent
FLOORS = (
    {"__main__", "launch"},
    {"cli", "__init__"},
    {"pictures"},
    {"sweeps"},
    {"api", "plugin"},
    {"publication"},
    {"access", "inspection", "export"},
    {"execution"},
    {"planning"},
    {"optimizer"},
    {"checkpoint"},
    {"comm", "storage", "safe_pickle"},
    {"config"},
    {"window_options", "named_source", "trajectory"},
    {"process", "schedule", "kernels", "options"},
    {"errors", "version"},
)
FORBIDDEN = {("plugin", "access"), ("plugin", "execution"), ("cli", "plugin")}
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file names in imports, wherever in it they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
    own = room_of(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "megatron":
            assert own == "plugin", "only the plugin knows Megatron"
        other = rest.partition(".")[0]
        if package != "wsm_megatron" or other in ("", own):
            continue
        assert floor[own] < floor[other], f"{name} is not below {own}"
        assert (own, other) not in FORBIDDEN, f"{own} may not import {other}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_lives_there(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    assert docstring is not None and docstring.count(".") >= 1


def test_no_package_is_a_fifth_of_the_whole() -> None:
    lines = {
        package: sum(len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py"))
        for package in PACKAGES
    }
    assert max(lines.values()) < sum(lines.values()) / 5, lines

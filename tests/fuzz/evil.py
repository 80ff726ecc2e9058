"""Stands for a module that a hostile pickle names: nothing of a merge imports or calls it."""

from __future__ import annotations

from pathlib import Path


def run(_: object) -> None:
    Path("fuzz-was-here").touch()

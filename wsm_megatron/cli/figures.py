"""Figures, as every command writes them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes in decimal units, as storage counts them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def known_tokens(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"

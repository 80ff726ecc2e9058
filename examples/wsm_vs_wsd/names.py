"""How the models that are compared are called: the same words in all seeds."""

from __future__ import annotations

DECAYS = ("mean", "ema", "cosine", "1-sqrt")
"""Of merges. ``linear`` is ``mean`` where checkpoints are evenly spaced: w_i = 1 - i/n gives each
1/n."""
STYLES = ("linear", "cosine", "1-sqrt")
"""Of decays that are trained."""
MEGATRON_STYLES = {"1-sqrt": "minus_sqrt"}
"""What ``--lr-wsd-decay-style`` calls them, where it is another word."""


def stable(run: str, step: int) -> str:
    return f"{run}: stable at {step}"


def decay(run: str, style: str, window: int) -> str:
    return f"{run}: decay {style} {window}"


def merged(run: str, decay: str, window: int, interval: int, end: int) -> str:
    return f"{run}: merge {decay} {window}/{interval} at {end}"


def blocks(run: str, decay: str, window: int, interval: int, end: int) -> str:
    return f"{run}: blocks {decay} {window}/{interval} at {end}"

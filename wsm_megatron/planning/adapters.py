"""Adapters (LoRA) are outputs of two matrices: the output of two means is no mean of outputs.
Pure."""

from __future__ import annotations

from collections.abc import Iterable

_FIRST = ("lora_A", "lora_a", "lora_down", "lora_embedding_A", "linear_in")
_SECOND = ("lora_B", "lora_b", "lora_up", "lora_embedding_B", "linear_out")
_WITHIN = ("adapter", "lora")
"""``linear_in`` and ``linear_out`` are a pair inside of these (Megatron-Bridge, NeMo)."""


def adapter_pairs(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Both factors of every adapter among some keys."""
    there = set(keys)
    return sorted((key, other) for key in there if (other := _other(key)) in there)


def _other(key: str) -> str | None:
    """Key of the second factor to a first one."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        within = any(word in before.lower() for before in parts[:i] for word in _WITHIN)
        if part in _FIRST and (within or not part.startswith("linear")):
            second = _SECOND[_FIRST.index(part)]
            return ".".join([*parts[:i], second, *parts[i + 1 :]])
    return None

"""Weights in other people's formats: a checkpoint's model tensors under other names, in safetensors.

What becomes of each tensor is a table (``families/``), not code: names, and a pure rule for where the
elements go. May import ``planning`` and everything below; only ``api`` and ``cli`` import it.
"""

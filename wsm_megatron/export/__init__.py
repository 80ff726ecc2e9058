"""Weights for others: a checkpoint's model tensors under other names, in safetensors files.

What becomes of each tensor is a table (``families/``), not code: names, and a pure rule for where
its elements go. May import ``execution`` and everything below; ``api`` and ``cli`` import it.
"""

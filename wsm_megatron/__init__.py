"""WSM for Megatron: the effect of learning-rate decay by merging checkpoints (arXiv 2507.17634)."""

__version__ = "0.1.0"

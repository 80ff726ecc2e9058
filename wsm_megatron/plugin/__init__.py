"""The training plugin: the only part of the package that imports ``megatron.training``."""

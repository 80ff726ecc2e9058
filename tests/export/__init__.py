"""Exports of models that real megatron-core saved, read by what others read them with."""

"""Runs of Megatron-LM's own ``pretrain_gpt.py`` on CPU ranks.

They need a checkout of Megatron-LM in ``MEGATRON_LM_DIR`` (core_v0.16.1 and main of August 2026 are
known to run), the package megatron-core of the same Python for its compiled dataset helpers, and
what Megatron-LM imports: pybind11 regex six requests psutil pydantic. Without the variable they are
skipped.
"""

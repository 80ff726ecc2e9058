"""The ``torch_dist`` format, and every key that Megatron writes.

May import ``safe_pickle``, ``storage`` and below.
"""

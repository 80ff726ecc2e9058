"""Main params and moments: where a checkpoint keeps them, and whether they are the model's.

May import ``checkpoint`` and below.
"""

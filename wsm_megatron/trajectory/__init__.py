"""The path that a run's checkpoints lie on: sums over their weights, and what these say.

Needs torch and the checkpoints' tensors once, as float64 inner products; all else follows from
those. Imports ``schedule`` and ``errors``. Looks at no file.
"""

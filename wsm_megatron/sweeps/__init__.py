"""From many merges to one choice: a grid made of one read, its manifest, scores, the selection, and
the search for coefficients.

May import ``api`` and below.
"""

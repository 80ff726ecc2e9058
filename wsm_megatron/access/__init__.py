"""Which rank sees which files.

May import ``execution`` and below; the only package that knows that ranks may see different
ones.
"""

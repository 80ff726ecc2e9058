"""Metadata in, tasks out: what is merged, from what, into what.

May import ``optimizer`` and below.
"""

"""Ranks: how they start, find each other, talk, notice that one is lost.

Knows no merge; may import ``process``.
"""

"""Decay curves, windows, and the coefficients that follow.

Pure; may import nothing but ``errors``.
"""

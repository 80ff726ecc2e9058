"""Decay curves, windows and the coefficients that follow. Pure."""

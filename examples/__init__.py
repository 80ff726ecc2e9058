"""Runnable examples; each folder says how to start it."""

"""Merges of checkpoints that lie on node-local storage."""

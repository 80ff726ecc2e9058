"""Merges of checkpoints that are spread over the disks of several nodes."""

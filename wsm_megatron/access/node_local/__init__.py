"""Merges of checkpoints that are assignment over the disks of several nodes."""

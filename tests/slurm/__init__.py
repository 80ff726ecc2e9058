"""Tests on a real Slurm of two nodes, started on this machine for the session."""

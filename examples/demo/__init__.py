"""The demo: train at a constant LR, merge the last checkpoints, compare the held-out losses.

``scripts/demo.sh`` runs it; ``python -m examples.demo --help`` says what can be changed.
"""

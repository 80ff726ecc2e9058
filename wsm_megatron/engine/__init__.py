"""The merge itself: plan, run, publish, verify."""

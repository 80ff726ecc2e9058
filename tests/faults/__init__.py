"""What is left, and what a second run makes of it, when something dies in the middle of a merge."""

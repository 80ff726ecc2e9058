"""Tasks in, files out: one rank's part of a merge."""

"""Tasks in, files out: one rank's part of a merge. May import ``planning`` and below."""

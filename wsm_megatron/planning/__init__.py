"""Metadata in, tasks out. Reads no tensor that is merged."""

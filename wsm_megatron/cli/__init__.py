"""The ``wsm`` command: options in, text out. May import everything but ``plugin``."""

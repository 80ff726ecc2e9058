"""The one exception that a merge raises beside ``ValueError``."""


class MergeError(RuntimeError):
    """A merge, a verification or a keep failed for a reason outside the caller's arguments.

    Bad arguments raise :class:`ValueError`. The message names the checkpoint, the tensor where
    there is one, and the way out. In a distributed job the same error is raised on every rank.
    """

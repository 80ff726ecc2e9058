"""What a merge raises beside ``ValueError``."""


class MergeError(RuntimeError):
    """A merge, a verification or a keep failed for a reason outside the caller's arguments.

    Bad arguments raise :class:`ValueError`. The message names the checkpoint, the tensor where
    there is one, and the way out. In a distributed job the same error is raised on every rank.
    """


class StoppedError(MergeError):
    """A signal has ended the work; ``number`` says which."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number

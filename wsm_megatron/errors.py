"""What a merge raises beside ``ValueError``."""


class MergeError(RuntimeError):
    """A merge, a verification or a keep failed for a reason outside the caller's arguments.

    Bad arguments raise :class:`ValueError`. The message names the checkpoint, the tensor where
    there is one, and the way out. In a distributed job the same error is raised on every rank.
    """


class PassingError(MergeError):
    """What failed may go well the next time: the same command goes on from what is finished."""


class StorageError(PassingError):
    """Storage failed or hangs."""


class LostError(PassingError):
    """A rank does not answer."""


class StoppedError(PassingError):
    """A signal has ended the work; ``number`` says which."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number

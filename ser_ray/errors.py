"""Errors that a user can fix."""


class UserError(ValueError):
    """An error that the user can fix: shown as one line (what, where, what to do), exit code 2."""


class StorageError(UserError):
    """A path cannot be written any more: no other process could write there either."""


class MemoryShortageError(UserError):
    """A model and its batch did not fit into memory: with smaller batches they may."""


class ProcessDiedError(UserError):
    """A process was killed from outside, as by a lost machine or Ray's memory monitor: trying again may help."""

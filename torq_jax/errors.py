"""Errors that a user can act on. Each message names the values at fault and the remedy."""


class TorqError(ValueError):
    """Base of every error this project raises on purpose."""


class ConversionError(TorqError):
    """A checkpoint that cannot be read, converted or written; nothing half-done is left behind."""


class WriteError(ConversionError):
    """Files that cannot be written: a full disk, a read-only one, a limit."""


class ReadError(ConversionError):
    """Files that cannot be read, and may be again: a disk that is gone, a file that is damaged."""

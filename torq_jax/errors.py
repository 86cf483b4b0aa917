"""Errors that a user can act on. Each message names the values at fault and the remedy."""


class TorqError(ValueError):
    """Base of every error this project raises on purpose."""


class ConversionError(TorqError):
    """A checkpoint that cannot be read, converted or written; nothing half-done is left behind."""

"""Errors that are the user's to mend: one sentence that says what is wrong, where, and what to do."""


class ExportError(ValueError):
    """An export cannot be made or a file cannot be loaded; the message is one sentence for the user."""

"""Errors that are the user's to mend."""


class TaidError(ValueError):
    """Distillation cannot go on with this input; the message is one sentence for the user."""

"""Errors that are the user's to mend."""


class TaidError(ValueError):
    """Distillation cannot go on with this input; the message is one sentence for the user."""

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)

"""Errors that are the user's to mend: one sentence that says what is wrong, where, and what to do."""


def one_line(text: str) -> str:
    """Text in which what does not print, such as a line's end in the name of a file, is escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class ExportError(ValueError):
    """An export cannot be made or a file cannot be loaded; the message is one sentence for the user."""

    def __str__(self) -> str:
        return one_line(super().__str__())

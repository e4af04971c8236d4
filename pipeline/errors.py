"""Errors that end a run, and the exit codes that scripts can rely on."""

EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do. Exit code 2."""


class GateFailed(RuntimeError):
    """An exported file missed a gate: the sentence names file, gate, value and threshold. Exit code 1."""

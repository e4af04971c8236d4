"""Errors that end a run, and the exit codes that scripts can rely on."""

import os
from socket import gaierror

from export.errors import one_line

EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
TOO_MANY = 429
"""HTTP's status for too many requests."""


class UserError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do. Exit code 2."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class Unreachable(UserError):
    """A hub did not answer, or not as it should: the one failure that trying again may mend."""


def hub_error(sentence: str, cause: BaseException) -> UserError:
    """The error of something that could not be had from a hub.

    Args:
        sentence: what it says.
        cause: what the library raised.

    Returns:
        ``Unreachable`` where the network or the hub itself failed, not the request.
    """
    chain: list[BaseException] = [cause]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    statuses = [getattr(getattr(failure, "response", None), "status_code", 0) for failure in chain]
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline or any(400 <= status < 500 and status != TOO_MANY for status in statuses):
        return UserError(sentence)
    network = any(isinstance(failure, (ConnectionError, TimeoutError, gaierror)) for failure in chain)
    return Unreachable(sentence) if network or max(statuses) >= TOO_MANY else UserError(sentence)


class GateFailed(RuntimeError):
    """An exported file missed a gate: the sentence names file, gate, value and threshold. Exit code 1."""

    def __str__(self) -> str:
        return one_line(super().__str__())

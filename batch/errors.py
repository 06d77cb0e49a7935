"""All errors of a run, in one tree.

BatchError
├── SettingError        an option or a variable is missing or invalid
├── JournalError        the files beside the output are of another run, damaged, or in use
├── RefusedError        the platform refuses the key, the endpoint or the call
├── RejectedError       the platform refuses one request; its line fails, and the run goes on
├── ResultError         the result of one job cannot be read from its bucket; the job is sent again
├── InputFileError      lines of the input file are invalid; nothing was sent
├── InputChangedError   the input file has changed during the run
├── FailedLinesError    the run has ended, and some lines have failed
└── UnreachableError    the platform does not answer, or asks to wait; another attempt may succeed
"""

from __future__ import annotations

from typing import ClassVar

EXIT_CODES = {
    0: "every line is answered",
    1: "any other error; see the message",
    2: "invalid arguments, setting or files",
    3: "refused by the platform: key, endpoint or call",
    4: "the input file is invalid; nothing was sent",
    5: "some lines failed; they are in the errors file",
    6: "the platform is unreachable: the same command continues later",
    130: "interrupted: the same command continues",
}


class BatchError(Exception):
    """A run failed; the command line prints the message and exits with `exit_code`."""

    exit_code: ClassVar[int] = 1


class SettingError(BatchError):
    """An option or a variable is missing or invalid."""

    exit_code = 2


class JournalError(BatchError):
    """The files beside the output are of another run, damaged, or in use."""

    exit_code = 2


class RefusedError(BatchError):
    """The platform refuses the key, the endpoint or the call; another attempt would not help."""

    exit_code = 3


class RejectedError(BatchError):
    """The platform refuses one request with the HTTP status `status`; the message is its reason."""

    exit_code = 3

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ResultError(BatchError):
    """The result of one job cannot be read from the bucket that it is in."""


class InputFileError(BatchError):
    """Lines of the input file are invalid; the message has a line for each."""

    exit_code = 4


class InputChangedError(BatchError):
    """The input file has changed during the run."""


class FailedLinesError(BatchError):
    """The run has ended, and some lines have failed."""

    exit_code = 5


class UnreachableError(BatchError):
    """The platform does not answer, or asks to wait.

    Args:
        message: what happened.
        status: the HTTP status; None without an answer.
        retry_after_s: after which time the platform asks to be called again; None if it does not say.
    """

    exit_code = 6

    def __init__(self, message: str, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s

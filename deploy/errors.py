"""The errors of the deployment's commands; the message of each is the line that the user reads on stderr.

The exit code tells a script how to react: see `EXIT_CODES`, which has the builder's meanings.

DeployError
├── OptionError                  2: an option, a setting, or what the API says of the request
├── RefusedError                 3: no key, no permission, no such endpoint
├── DoctorError                  4: the model with its settings would not run
├── WorkerError                  4: the workers do not start, or do not answer
├── CapacityError                5: no GPU is free, or not in time
└── UnreachableError             6: the API cannot be reached, or fails
"""

EXIT_CODES = {
    0: "success",
    1: "any other error; see the message",
    2: "invalid arguments or settings, or the API does not accept the request",
    3: "refused: the API key, its permissions, or no such endpoint",
    4: "the model does not fit, or its worker does not start or answer",
    5: "no GPU is free, or the worker was not ready in time: wait, or choose others",
    6: "the API is unreachable or fails: try again later",
    130: "interrupted",
}


class DeployError(Exception):
    """A command failed; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class OptionError(DeployError):
    """An option or setting is invalid."""

    exit_code = 2


class RefusedError(DeployError):
    """The API refuses: the key, its permissions, or there is no such endpoint."""

    exit_code = 3


class DoctorError(DeployError):
    """The model with its settings would not run."""

    exit_code = 4


class WorkerError(DeployError):
    """The workers do not start, or do not answer."""

    exit_code = 4


class CapacityError(DeployError):
    """No GPU is free, or the worker was not ready in time."""

    exit_code = 5


class UnreachableError(DeployError):
    """The API cannot be reached, or fails."""

    exit_code = 6

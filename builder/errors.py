"""The errors of the builder's commands; the message of each is what the user reads on stderr.

The exit code tells a script how to react: see `EXIT_CODES`.

BuilderError
├── MissingPackageError
├── DestinationError
├── DiskSpaceError
├── HubError
│   └── HubUnreachableError
├── UnsupportedModelError
├── IntegrityError
├── TrainingError
├── WorkerError
├── ModelNotFoundError
├── ConfigError
├── UnknownSizeError
├── SettingError
└── DiagnosisError
"""

EXIT_CODES = {
    0: "success",
    1: "any other error; see the message",
    2: "invalid arguments, setting or directory",
    3: "refused by the hub: no such model, or no access to it",
    4: "files are missing or damaged, or the model is not supported",
    5: "not enough disk space",
    6: "the hub is unreachable: try again later",
    130: "interrupted",
}


class BuilderError(Exception):
    """A command failed; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class MissingPackageError(BuilderError):
    """A Python package that the command needs is not installed."""


class DestinationError(BuilderError):
    """The directory does not exist, is a file, or has other content."""

    exit_code = 2


class DiskSpaceError(BuilderError):
    """The disk does not have enough space for the model."""

    exit_code = 5


class HubError(BuilderError):
    """The hub refuses the request; a retry would not help."""

    exit_code = 3


class HubUnreachableError(HubError):
    """The hub cannot be reached, or all retries failed; it may work later."""

    exit_code = 6


class UnsupportedModelError(BuilderError):
    """The repository or directory has no model that vLLM can load."""

    exit_code = 4


class IntegrityError(BuilderError):
    """Files are missing, truncated or different from what is expected; the message has a line for each."""

    exit_code = 4


class TrainingError(BuilderError):
    """The tiny model failed its validation after training."""


class WorkerError(BuilderError):
    """The worker that the command has started failed."""


class ModelNotFoundError(BuilderError):
    """There is no config.json in the given directory, or it cannot be downloaded from the hub."""


class ConfigError(BuilderError):
    """The model's config.json cannot be read, or lacks something that is needed."""


class UnknownSizeError(BuilderError):
    """Neither the config nor the files give the model's size."""


class SettingError(BuilderError):
    """An option or environment variable has an invalid value."""

    exit_code = 2


class DiagnosisError(BuilderError):
    """The doctor found problems."""

"""What can go wrong in a builder command; each error's message is the one line that its user reads.

Its exit code tells a script what to do about it: see `EXIT_CODES`.

BuilderError
├── MissingPackageError
├── DestinationError
├── DiskSpaceError
├── HubError
│   └── HubUnreachableError
├── UnservableError
├── WrongFilesError
├── TrainingError
├── ModelNotFoundError
├── ConfigError
├── UnknownModelError
├── SettingError
└── DiagnosisError
"""

EXIT_CODES = {
    0: "done",
    1: "something else is wrong, which the message says",
    2: "the command line, a setting or the directory that was named is wrong",
    3: "the hub refuses: no such model, no access",
    4: "files are missing, damaged or no model that can be served",
    5: "the disk is full or too small",
    6: "the hub cannot be reached now: try later",
    130: "interrupted",
}


class BuilderError(Exception):
    """A builder command could not do its work; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class MissingPackageError(BuilderError):
    """A Python package that the command needs is not installed."""


class DestinationError(BuilderError):
    """The directory that the user named holds something else, or is not a directory."""

    exit_code = 2


class DiskSpaceError(BuilderError):
    """The disk has no room for the model."""

    exit_code = 5


class HubError(BuilderError):
    """The hub does not give what was asked for, and asking again would not change that."""

    exit_code = 3


class HubUnreachableError(HubError):
    """The hub could not be asked, or did not answer often enough; another time it may."""

    exit_code = 6


class UnservableError(BuilderError):
    """The repository or the directory holds nothing that vLLM could load."""

    exit_code = 4


class WrongFilesError(BuilderError):
    """Files are missing, cut short or not what they should be; the message has a line for each."""

    exit_code = 4


class TrainingError(BuilderError):
    """The tiny model did not learn its corpus, or did not read back from its files as it was trained."""


class ModelNotFoundError(BuilderError):
    """There is no config.json where the user said that the model is, or the hub did not give it."""


class ConfigError(BuilderError):
    """The model's config.json does not say what is needed, or cannot be read."""


class UnknownModelError(BuilderError):
    """The model's size can be told neither from its config nor from its files."""


class SettingError(BuilderError):
    """An option or a variable has a value that is not allowed."""

    exit_code = 2


class DiagnosisError(BuilderError):
    """The doctor found something that is wrong."""

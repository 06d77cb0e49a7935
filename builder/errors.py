"""What can go wrong in a builder command; each error's message is the one line that its user reads.

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


class BuilderError(Exception):
    """A builder command could not do its work; the command line prints the message and exits with 1."""


class MissingPackageError(BuilderError):
    """A Python package that the command needs is not installed."""


class DestinationError(BuilderError):
    """The directory that the user named holds something else, or is not a directory."""


class DiskSpaceError(BuilderError):
    """The disk has no room for the model."""


class HubError(BuilderError):
    """The hub does not give what was asked for, and asking again would not change that."""


class HubUnreachableError(HubError):
    """The hub could not be asked, or did not answer often enough; another time it may."""


class UnservableError(BuilderError):
    """The repository or the directory holds nothing that vLLM could load."""


class WrongFilesError(BuilderError):
    """Files are missing, cut short or not what they should be; the message has a line for each."""


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


class DiagnosisError(BuilderError):
    """The doctor found something that is wrong."""

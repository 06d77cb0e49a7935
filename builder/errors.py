"""What can go wrong in a builder command; each error's message is the one line that its user reads.

BuilderError
├── MissingPackageError
├── DestinationError
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

"""What can go wrong in a builder command; each error's message is the one line that its user reads.

BuilderError
├── MissingPackageError
├── DestinationError
└── TrainingError
"""


class BuilderError(Exception):
    """A builder command could not do its work; the command line prints the message and exits with 1."""


class MissingPackageError(BuilderError):
    """A Python package that the command needs is not installed."""


class DestinationError(BuilderError):
    """The directory that the user named holds something else, or is not a directory."""


class TrainingError(BuilderError):
    """The tiny model did not learn its corpus, or did not read back from its files as it was trained."""

"""Makes the tiny model for tests and for a first run without a GPU."""

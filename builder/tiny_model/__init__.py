"""Makes the tiny model that tests and the first run use."""

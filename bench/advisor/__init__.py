"""The parts of `python -m bench advise`: a worker's figures, arrivals, the simulation, and the search for settings."""

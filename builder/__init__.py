"""Prepares models and images before a worker starts: download, verification, manifest, doctor, the tiny model.

Run it as `python -m builder COMMAND`; each command is a module or a package. Nothing here imports `engine` or
`emulator`.
"""

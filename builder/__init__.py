"""Makes what an image or a developer's machine holds before a worker starts.

`python -m builder COMMAND` is the way in; each command is one module. Nothing here imports `engine` or `emulator`.
"""

"""A free port for a process that binds it itself, later."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below Linux' and BSD's ranges for outgoing connections, which begin at 32768 and 49152: until the process binds its
# port, a connection of any program could be given one of those.
_PORTS = range(20_000, 32_768)


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port

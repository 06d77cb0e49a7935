"""Runs a module so that the SDK's network check passes, whether this machine is online or not.

    unshare --map-root-user --net python -m tests.online MODULE [ARGUMENT...]

The check connects to port 53 of 8.8.8.8. The module gets its own network namespace, whose loopback interface has that
address, and a server that listens there.
"""

from __future__ import annotations

import fcntl
import runpy
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence

_ADDRESS, _PORT = "8.8.8.8", 53
_NAMESPACE = ("unshare", "--map-root-user", "--net")
# From <linux/sockios.h> and <linux/if.h>; see netdevice(7).
_SIOCSIFFLAGS, _SIOCSIFADDR, _IFF_UP = 0x8914, 0x8916, 1


def is_available() -> bool:
    """Return whether users of this machine may create network namespaces."""
    try:
        return subprocess.run([*_NAMESPACE, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def command(module: str, *arguments: str) -> Sequence[str]:
    """Return the command that runs the module so."""
    return [*_NAMESPACE, sys.executable, "-m", "tests.online", module, *arguments]


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
        address = socket.inet_aton(_ADDRESS)
        fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16sHH4s16x", b"lo:1", socket.AF_INET, 0, address))
    with socket.create_server((_ADDRESS, _PORT)):
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""Network interfaces of this machine: addresses and MTU. Linux; elsewhere nothing is known."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of netdevice(7)."""


def address_of(interface: str) -> str:
    """IPv4 address of an interface; empty if it has none or there is no such interface."""
    try:
        import fcntl
    except ImportError:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def mtu_of(interface: str) -> int:
    """Largest packet of an interface in bytes; 0 where it is not known."""
    try:
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def interface_names() -> tuple[str, ...]:
    """Interfaces of this machine that have an IPv4 address."""
    return tuple(name for _, name in socket.if_nameindex() if address_of(name))

"""Addresses of the form HOST:PORT, checked: ZeroMQ takes a port beyond 65535 modulo 65536 and says nothing."""

from __future__ import annotations

from helixbench.errors import InputError

LAST_PORT = 2**16 - 1


def require_address(text: str, *, first_port: int = 1) -> str:
    """The address, where it has a host and a port of ``first_port`` (0: any free one) or more.

    Raises:
        ValueError: what is needed instead.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ValueError("need HOST:PORT, like 10.0.0.7:9000")
    if not first_port <= int(port) <= LAST_PORT:
        raise ValueError(f"need HOST:PORT with a port of {first_port} to {LAST_PORT}")
    return text


def require_listen(text: str) -> None:
    """Check what ``--listen`` was given.

    Raises:
        InputError: not an address; whether it is free is seen when it is bound.
    """
    try:
        require_address(text, first_port=0)
    except ValueError as error:
        raise InputError(f"--listen {text}: {error}") from error

"""The cluster key: one CURVE key pair shared by all processes of a cluster; connections without it are rejected.

The file is a JSON object with the Z85 texts ``public`` and ``secret``, readable by its owner only.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec

from helixbench.errors import InputError

_Z85_KEY = r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}"


class ClusterKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair (RFC 26/CurveZMQ), each half 40 characters of Z85."""

    public: str
    secret: str

    def __post_init__(self) -> None:
        if not all(re.fullmatch(_Z85_KEY, half) for half in (self.public, self.secret)):
            raise ValueError("public, secret: need 40 characters of Z85 each")


def make_key_file(path: Path) -> None:
    """Write a new cluster key.

    Raises:
        InputError: the file exists already or cannot be written.
    """
    import zmq

    public, secret = zmq.curve_keypair()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(ClusterKey(public.decode(), secret.decode())) + b"\n")


def load_key_file(path: Path) -> ClusterKey:
    """Read a cluster key.

    Raises:
        InputError: no such file, not a key, or readable by users other than its owner.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(f"{path}: other users can read this key; run: chmod 600 {path}")
        return msgspec.json.decode(path.read_bytes(), type=ClusterKey)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make one with: helixbench agent --make-key {path}"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a cluster key ({error}); make one with: helixbench agent --make-key {path}"
        ) from error

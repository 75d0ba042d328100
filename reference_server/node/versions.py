"""Versions of the libraries that decide how fast and how exactly a stage runs."""

from __future__ import annotations

import platform
from importlib import metadata


def library_versions() -> dict[str, str]:
    """Library -> version, of this process."""
    return {"python": platform.python_version()} | {
        library: metadata.version(library) for library in ("helixbench", "torch", "transformers", "pyzmq")
    }

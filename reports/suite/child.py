"""Steps: commands of this program, each in a process of its own that is always waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

_Stream: TypeAlias = IO[bytes] | IO[str] | int | None

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One command, and the file or folder that it makes. Arguments that are paths are ``Path``."""

    title: str
    arguments: tuple[str | Path, ...]
    makes: Path

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments as text. Records keep it, so paths below the working directory are relative to it."""
        return tuple(_shown(argument) if isinstance(argument, Path) else argument for argument in self.arguments)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_child(arguments: Sequence[str], *, stdout: _Stream, stderr: _Stream) -> int:
    """Run ``helixbench ARGUMENTS``; its exit code, or ``INTERRUPTED`` or ``TERMINATED`` if the user ended it.

    Ctrl-C reaches the child through the terminal's process group as well; SIGTERM is forwarded. Either way the child is
    waited for, because it has nodes to stop.
    """
    child = subprocess.Popen([sys.executable, "-m", "helixbench", *arguments], stdout=stdout, stderr=stderr)
    is_terminated = False

    def forward(*_: object) -> None:
        nonlocal is_terminated
        is_terminated = True
        child.terminate()

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        exit_code = _wait(child)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return TERMINATED if is_terminated else exit_code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit code; ``INTERRUPTED`` however often Ctrl-C is pressed while the child cleans up."""
    is_interrupted = False
    while True:
        try:
            exit_code = child.wait()
        except KeyboardInterrupt:
            is_interrupted = True
        else:
            if is_interrupted:
                return INTERRUPTED
            return exit_code if exit_code >= 0 else 128 - exit_code

"""Steps of a chain: commands of this program, each in a process of its own, waited for however it is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, TypeAlias

import msgspec

_Stream: TypeAlias = IO[bytes] | IO[str] | int | None

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One command of the chain and the file or folder that it makes."""

    title: str
    arguments: tuple[str, ...]
    makes: str


def run_child(arguments: Sequence[str], *, stdout: _Stream, stderr: _Stream) -> int:
    """Run ``helixbench ARGUMENTS`` and return its exit code; ``INTERRUPTED`` or ``TERMINATED`` where the user ended it.

    A Ctrl-C reaches the child through the terminal's process group as well, SIGTERM is handed on. It is waited for,
    since it has nodes to stop.
    """
    child = subprocess.Popen([sys.executable, "-m", "helixbench", *arguments], stdout=stdout, stderr=stderr)
    is_terminated = False

    def hand_on(*_: object) -> None:
        nonlocal is_terminated
        is_terminated = True
        child.terminate()

    previous = signal.signal(signal.SIGTERM, hand_on)
    try:
        exit_code = _wait(child)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return TERMINATED if is_terminated else exit_code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Its exit code; ``INTERRUPTED`` however often Ctrl-C is pressed while it cleans up."""
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

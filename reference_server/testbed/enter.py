"""Run a program in a network namespace, and let it die with the process that started it.

Run by path, not imported: it joins the namespace before the program's first instruction, and loads nothing of ours.

    python -I -S enter.py --parent PID [--netns FILE] -- PROGRAM [ARGUMENT ...]
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


def main(arguments: list[str]) -> None:
    """Join, then become the program."""
    # Until the program takes over, a Ctrl-C that is passed on ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    split = arguments.index("--")
    options = dict(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    program = arguments[split + 1 :]
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(options["--parent"]):
        sys.exit("the process that started this one is gone")
    if "--netns" in options:
        descriptor = os.open(options["--netns"], os.O_RDONLY | os.O_CLOEXEC)
        _require(libc.setns(descriptor, _CLONE_NEWNET), f"setns({options['--netns']})")
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"{program[0]}: cannot be run ({error.strerror})")


def _require(result: int, what: str) -> None:
    if result != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(sys.argv[1:])

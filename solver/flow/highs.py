"""HiGHS, without the two lines by which it greets on stdout."""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType

from helixbench.errors import InputError


@functools.cache
def load_highspy() -> ModuleType:
    """The module ``highspy``, after its first solver was made: that one greets, whatever its options are (1.16).

    It writes to the file descriptor, so that is where it has to be kept from it: with ``--json`` nothing but the record
    is to be on stdout.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highspy
    except ImportError as error:
        raise InputError(f"HiGHS, which computes all flows, is not installed ({error}): pip install highspy") from error

    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
    return highspy

"""Errors that end a command, each with its exit code."""

from __future__ import annotations


class HelixbenchError(Exception):
    """Base of all errors that a user can cause or meet; shown as one message, never as a traceback."""

    exit_code = 1


class InputError(HelixbenchError):
    """Invalid file, option or machine; the message names file, field, value and remedy. Exit code 2."""

    exit_code = 2


class MeasurementError(HelixbenchError):
    """A number could not be measured. Exit code 3."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

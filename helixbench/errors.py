"""The errors that end a command, each with the exit code that it ends with."""

from __future__ import annotations


class HelixbenchError(Exception):
    """Base of every error that a user can cause or meet; shown as one message, never as a traceback."""

    exit_code = 1


class InputError(HelixbenchError):
    """A file, an option or a machine is not as it has to be: names file, field, value and remedy. Exit code 2."""

    exit_code = 2


class MeasurementError(HelixbenchError):
    """A number could not be measured, so none is given. Exit code 3."""

    exit_code = 3

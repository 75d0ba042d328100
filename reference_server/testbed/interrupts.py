"""Ctrl-C and SIGTERM end a run in good order: once, at a moment when nothing is half made."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While it is entered, the first signal raises in the main thread; later ones are noted and do no more.

    So the clean-up that the first one sets off is not itself cut short. SIGINT raises ``KeyboardInterrupt``, the
    others ``SystemExit`` with 128 + the signal's number. Entered in another thread than the main one it does nothing:
    signals are the main thread's.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._noted: int | None = None
        self._driver: int | None = None  # pid that signals are passed on to
        self._num_forwarded = 0
        self._previous: dict[int, signal._HANDLER] = {}  # signal -> handler to put back

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup keeps its meaning
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None and self._noted is not None:
            raise _exception(self._noted)

    def hold(self) -> None:
        """From here on signals are noted only; one that came is raised on leaving."""
        self._is_held = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal that comes inside is raised at the end."""
        was_held, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = was_held
            if not was_held and self._noted is not None:
                number, self._noted = self._noted, None
                self._raise(number)

    @contextlib.contextmanager
    def passed_to(self, pid: int) -> Iterator[None]:
        """A signal that comes inside goes to that child process; from the third on, the child is killed."""
        self._driver, self._num_forwarded = pid, 0
        try:
            yield
        finally:
            self._driver = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._driver is not None:
            self._num_forwarded += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._driver, number if self._num_forwarded < 3 else signal.SIGKILL)
        elif self._is_held:
            self._noted = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        self._is_held = True
        raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

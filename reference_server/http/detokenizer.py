"""Text out of tokens as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A UTF-8 character has at most 4 bytes and a token at least one: so many bytes, or marks in their place, may be missing
# the rest of their character.
MAX_BROKEN_CHARACTERS = 3
BROKEN = "\N{REPLACEMENT CHARACTER}"

CONTEXT_TOKENS = 8  # kept before the newest token, so that spaces and joined characters come out as in the whole text
WINDOW_TOKENS = 32


class Detokenizer:
    """Decodes one sequence token by token; all that it gave, in order, is the text of the whole.

    Args:
        decode: token ids to text; special tokens give none.
        prompt: what the output continues. Its text is not given, but the first output token is read in its light.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = self._end_of(prompt)  # the newest tokens; older ones change nothing any more
        self._given = _without_broken_end(decode(self._window))  # of the window's text: what was given, or the prompt's
        self._has_output = False
        self._num_waiting = 0  # tokens since the last that brought text

    def push(self, token: int) -> str:
        """The text that is certain now; empty where a character is not complete."""
        self._window.append(token)
        self._has_output = True
        self._num_waiting += 1
        text = self._decode(self._window)
        certain = _without_broken_end(text)
        if not certain.startswith(self._given):
            # Some decoders read a run of bytes as a whole: while its last character is incomplete, all of it is broken.
            return self._restart() if self._num_waiting >= WINDOW_TOKENS else ""
        new = certain[len(self._given) :]
        self._given = certain
        if new:
            self._num_waiting = 0
        self._forget_old(text)
        return new

    def flush(self) -> str:
        """What is left when no token follows: incomplete characters come out as marks."""
        if not self._has_output:
            return ""
        text = self._decode(self._window)
        if not text.startswith(self._given):
            return self._decode(self._window[-self._num_waiting :])
        return text[len(self._given) :]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character on."""
        ends = (list(prompt[-size:]) for size in range(CONTEXT_TOKENS, WINDOW_TOKENS))
        return next((end for end in ends if not self._decode(end).startswith(BROKEN)), [])

    def _restart(self) -> str:
        """Bytes that never became characters: what waits is given by itself, and what came before is forgotten."""
        self._window = self._window[-self._num_waiting :]
        self._given = _without_broken_end(self._decode(self._window))
        self._num_waiting = 0
        return self._given

    def _forget_old(self, text: str) -> None:
        if len(self._window) < WINDOW_TOKENS:
            return
        window = self._window[-CONTEXT_TOKENS:]
        newest = self._decode(window)
        if newest and text.endswith(newest):  # else the cut went through a character: try again with the next token
            num_uncertain = len(text) - len(self._given)
            self._window, self._given = window, newest[: len(newest) - num_uncertain]


def _without_broken_end(text: str) -> str:
    num_broken = min(len(text) - len(text.rstrip(BROKEN)), MAX_BROKEN_CHARACTERS)
    return text[: len(text) - num_broken]


class StopStrings:
    """Holds back text that may turn out to be a stop string, and ends before the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that no stop string can reach back into, and whether one was found."""
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            before, self._held = self._held[: min(found)], ""
            return before, True
        num_held = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - num_held
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain, False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)

"""Text out of tokens as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

BROKEN = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 32  # without a character among them: bytes that will not become one
CONTEXT_TOKENS = range(4, 24)  # of the prompt's end, so that the first output token is read as what continues it


class Detokenizer:
    """Decodes one sequence token by token; all that it gave, in order, is the text of the whole.

    Args:
        tokenizer: of the tokenizers library.
        prompt: what the output continues. Its text is not given, but the first output token is read in its light.
        skip_special_tokens: special tokens give no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._stream = DecodeStream(ids=self._end_of(prompt), skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []  # the tokens since the last that brought text

    def push(self, token: int) -> str:
        """The text that is certain now; empty where a character is not complete."""
        self._held.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:  # tokenizers has no type of its own for a text that does not continue the one before
            return self._restart()
        if text is None:
            return self._restart() if len(self._held) >= MAX_HELD_TOKENS else ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is left when no token follows: incomplete characters come out as marks."""
        return self._decode(self._held)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character to the end of one."""
        ends = (list(prompt[-size:]) for size in CONTEXT_TOKENS)
        return next((end for end in ends if BROKEN not in self._decode(end)), [])

    def _restart(self) -> str:
        """Give what is held by itself, broken characters and all, and forget what came before."""
        text = self._decode(self._held)
        self._held.clear()
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skips)
        return text


class StopStrings:
    """The stop strings of a request; each of its outputs has a ``StopMatcher`` of its own."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(dict.fromkeys(stops))
        # Knuth, Morris and Pratt: for each beginning of a stop string, the longest shorter beginning that it ends with
        self.borders = tuple(_borders(stop) for stop in self.stops)


class StopMatcher:
    """Holds back text that may turn out to be a stop string, and ends before the first one to be complete.

    Each character costs a few steps for each stop string, however long that is.
    """

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._matched = [0] * len(strings.stops)  # stop string -> characters of it that the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that no stop string can reach back into, and whether one was found."""
        if not self._matched:
            return text, False
        whole = self._held + text
        for place, character in enumerate(text, start=len(self._held)):
            longest = max(self._step(index, character) for index in range(len(self._matched)))
            if longest:
                self._held = ""
                return whole[: place + 1 - longest], True
        cut = len(whole) - max(self._matched)
        self._held = whole[cut:]
        return whole[:cut], False

    def flush(self) -> str:
        """Text that was held back and is not part of a stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, index: int, character: str) -> int:
        """Take in one character; length of the stop string where it is complete now, else 0."""
        stop, borders = self._strings.stops[index], self._strings.borders[index]
        matched = self._matched[index]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched if matched == len(stop) else 0


def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning ``stop[:i + 1]``: length of its longest proper beginning that is its end, too."""
    borders = [0]
    for character in stop[1:]:
        border = borders[-1]
        while border and stop[border] != character:
            border = borders[border - 1]
        borders.append(border + (stop[border] == character))
    return tuple(borders)

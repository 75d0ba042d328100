"""Histories: what each client of a run sent and heard, as JSON lines, and a judgement of them that trusts nothing else.

A line is one thing that one client did or saw. The server's own records play no part in the judgement, so that a fault
of the server cannot hide itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeAlias

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.hash_reference import Output, first_differences
from helixbench.solver.scheduling.requests import FinishReason, Request, TokenEvent


class Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sent"):
    """A client sent a request."""

    request: int
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="token", omit_defaults=True):
    """A client got a token; its last one says why it is the last."""

    request: int
    at_s: float
    token: int
    reason: FinishReason = ""


class Ended(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ended"):
    """A request ended without a further token: with an error, or because its client had gone."""

    request: int
    at_s: float
    reason: FinishReason


Line: TypeAlias = Sent | Token | Ended
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class HistoryWriter:
    """Writes a history as it happens."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def sent(self, request: Request, at_s: float) -> None:
        """A request goes out."""
        self._write(Sent(request.number, at_s, request.prompt, request.max_tokens))

    def heard(self, event: TokenEvent, at_s: float) -> None:
        """Something comes back."""
        if event.token is None:
            self._write(Ended(event.request, at_s, event.reason))
        else:
            self._write(Token(event.request, at_s, event.token, event.reason))

    def _write(self, line: Line) -> None:
        self._file.write(_encoder.encode(line).decode() + "\n")


@contextmanager
def history_to(path: Path | None) -> Iterator[HistoryWriter | None]:
    """A writer to that file; ``None`` for no file."""
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:
        yield HistoryWriter(file)


class Verdict(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="helixbench.history-verdict/1"):
    """What is wrong with a history, as counts of requests.

    Attributes:
        requests: sent.
        finished: got their last token.
        tokens: heard in all.
        failed: ended with an error, which clients were told.
        unfinished: still being answered when the history ends: allowed, for a load ends with requests in flight.
        lost: got fewer tokens than asked for, and yet a reason to end as if that were all.
        duplicated: heard something after their end, or more tokens than asked for.
        unknown: heard of a request that was never sent, or sent twice.
        wrong: got a token that is not the model's; ``None`` where the model has no reference.
        longest_gap_s: between two tokens of a request, by the devices' time.
    """

    requests: int
    finished: int
    tokens: int
    failed: int
    unfinished: int
    lost: int
    duplicated: int
    unknown: int
    wrong: int | None
    longest_gap_s: float

    @property
    def is_good(self) -> bool:
        """Whether every client got what it asked for, or a clear error."""
        return not (self.lost or self.duplicated or self.unknown or self.wrong)


class _Seen(msgspec.Struct):
    sent: Sent
    tokens: list[int] = []
    last_s: float | None = None
    reason: FinishReason = ""


def judge(path: Path, model: HashModel | None) -> Verdict:
    """Judge the history in a file.

    Args:
        path: of JSON lines.
        model: whose tokens they are to be; ``None`` where there is no reference to compare with.

    Raises:
        InputError: not a history.
    """
    seen: dict[int, _Seen] = {}
    faults: Counter[str] = Counter()
    longest_gap_s = 0.0
    for number, line in enumerate(_lines(path), start=1):
        try:
            one = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}:{number}: not a line of a history ({error}); make one with --history") from error
        known = seen.get(one.request)
        if isinstance(one, Sent):
            faults["unknown"] += known is not None
            seen[one.request] = _Seen(one)
        elif known is None:
            faults["unknown"] += 1
        elif known.reason or (isinstance(one, Token) and len(known.tokens) >= known.sent.max_tokens):
            faults["duplicated"] += 1
        else:
            known.reason = one.reason
            if isinstance(one, Token):
                known.tokens.append(one.token)
                if known.last_s is not None:
                    longest_gap_s = max(longest_gap_s, one.at_s - known.last_s)
                known.last_s = one.at_s
    done = [one for one in seen.values() if one.reason in ("length", "stop")]
    short = [one for one in done if one.reason == "length" and len(one.tokens) < one.sent.max_tokens]
    wrong = None
    if model is not None:
        outputs = [Output(one.sent.request, one.sent.prompt, one.tokens) for one in seen.values() if one.tokens]
        wrong = len(first_differences(outputs, num_layers=model.num_layers, vocab_size=model.vocab_size))
    return Verdict(
        requests=len(seen),
        finished=len(done),
        tokens=sum(len(one.tokens) for one in seen.values()),
        failed=sum(one.reason in ("error", "abort") for one in seen.values()),
        unfinished=sum(not one.reason for one in seen.values()),
        lost=len(short),
        duplicated=faults["duplicated"],
        unknown=faults["unknown"],
        wrong=wrong,
        longest_gap_s=longest_gap_s,
    )


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

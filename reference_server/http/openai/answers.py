"""Answers of OpenAI's protocol: one JSON object, or one event per output token."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

import msgspec

from helixbench.solver.scheduling.work import Scores, TokenScore

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Piece(msgspec.Struct, frozen=True):
    """What one output token adds to a choice; ``finish_reason`` with the last one.

    ``token`` is ``None`` where only the prompt was to be scored.
    """

    choice: int
    token: int | None
    text: str
    finish_reason: str | None = None
    scores: Scores | None = None


class AnswerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer holds beside the outputs.

    Attributes:
        model_name: of the model.
        prompts: token ids of each prompt.
        echo: texts of the prompts where choices begin with them; else empty.
        n: choices of each prompt.
        num_logprobs: of the likeliest tokens beside each token; ``None`` for no log probabilities.
        include_usage: token counts in one more event at the end.
        continuous_usage: token counts in every event.
        token_text: text of one token.
    """

    model_name: str
    prompts: tuple[tuple[int, ...], ...]
    echo: tuple[str, ...]
    n: int
    num_logprobs: int | None
    include_usage: bool
    continuous_usage: bool
    token_text: Callable[[int], str]


class Answer(ABC):
    """One answer: what its events share, and its token counts so far."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    event_object: ClassVar[str]

    def __init__(self, options: AnswerOptions) -> None:
        self.options = options
        self._head = {"id": f"{self.id_prefix}{uuid.uuid4().hex}", "created": int(time.time())}
        self._num_prompt_tokens = sum(map(len, options.prompts))
        self._num_output_tokens = 0
        self._has_begun = [False] * (len(options.prompts) * options.n)

    def event(self, piece: Piece) -> bytes:
        """The piece as an event."""
        choice = self._next(piece)
        members: dict[str, Any] = {"choices": [choice | {"finish_reason": piece.finish_reason}]}
        if self.options.continuous_usage:
            members["usage"] = self._usage()
        elif self.options.include_usage:
            members["usage"] = None
        return self._encode(self.event_object, members)

    def usage_event(self) -> bytes | None:
        """The event after the last piece, where it was asked for."""
        if not self.options.include_usage:
            return None
        return self._encode(self.event_object, {"choices": [], "usage": self._usage()})

    async def whole(self, pieces: AsyncIterator[Piece]) -> bytes:
        """The answer as one object."""
        texts: list[list[str]] = [[] for _ in self._has_begun]
        logprobs: list[dict[str, list[Any]] | None] = [None] * len(texts)
        reasons: list[str | None] = [None] * len(texts)
        async for piece in pieces:
            text, new = self._take(piece)
            texts[piece.choice].append(text)
            reasons[piece.choice] = piece.finish_reason
            known = logprobs[piece.choice]
            if known is None:
                logprobs[piece.choice] = new
            elif new is not None:
                for name, values in known.items():
                    values.extend(new[name])
        choices = [
            {"index": index} | self._whole_choice("".join(parts), logprobs[index]) | {"finish_reason": reasons[index]}
            for index, parts in enumerate(texts)
        ]
        return self._encode(self.whole_object, {"choices": choices, "usage": self._usage()})

    @abstractmethod
    def _next(self, piece: Piece) -> dict[str, Any]:
        """What the piece adds to its choice."""

    @abstractmethod
    def _whole_choice(self, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        """A choice, all of it."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, list[Any]]:
        """Log probabilities of those tokens of a choice; the first token of a prompt has none."""

    def _take(self, piece: Piece) -> tuple[str, dict[str, list[Any]] | None]:
        """Text and log probabilities that the piece adds; the prompt's come with the first."""
        prompt = piece.choice // self.options.n
        is_first = not self._has_begun[piece.choice]
        self._has_begun[piece.choice] = True
        self._num_output_tokens += piece.token is not None
        text = piece.text
        tokens: list[tuple[int, TokenScore | None]] = []
        if is_first and self.options.echo:
            text = self.options.echo[prompt] + text
            if piece.scores is not None:
                tokens += zip(self.options.prompts[prompt], (None, *piece.scores.prompt), strict=True)
        if self.options.num_logprobs is None:
            return text, None
        assert piece.scores is not None, "the engine scored no token"
        if piece.token is not None:
            tokens.append((piece.token, piece.scores.output))
        return text, self._logprobs(tokens)

    def _usage(self) -> dict[str, int]:
        prompt, output = self._num_prompt_tokens, self._num_output_tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _encode(self, kind: str, members: dict[str, Any]) -> bytes:
        return msgspec.json.encode(self._head | {"object": kind, "model": self.options.model_name} | members)


class CompletionAnswer(Answer):
    """Answer of ``/v1/completions``."""

    id_prefix = "cmpl-"
    whole_object = event_object = "text_completion"

    def __init__(self, options: AnswerOptions) -> None:
        super().__init__(options)
        self._offsets = [0] * len(self._has_begun)  # choice -> characters of the tokens so far

    def _next(self, piece: Piece) -> dict[str, Any]:
        text, logprobs = self._take(piece)
        return {"index": piece.choice, "text": text, "logprobs": logprobs}

    def _whole_choice(self, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def _take(self, piece: Piece) -> tuple[str, dict[str, list[Any]] | None]:
        text, logprobs = super()._take(piece)
        if logprobs is not None:
            logprobs["text_offset"] = offsets = []
            for token in logprobs["tokens"]:
                offsets.append(self._offsets[piece.choice])
                self._offsets[piece.choice] += len(token)
        return text, logprobs

    def _logprobs(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, list[Any]]:
        added: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token, score in tokens:
            added["tokens"].append(self.options.token_text(token))
            added["token_logprobs"].append(None if score is None else _finite(score.logprob))
            added["top_logprobs"].append(None if score is None else self._by_text(token, score))
        return added

    def _by_text(self, token: int, score: TokenScore) -> dict[str, float]:
        """The likeliest tokens and the chosen one, by text; of several tokens with one text the likeliest counts."""
        by_text: dict[str, float] = {}
        for one, logprob in (*score.top, (token, score.logprob)):
            by_text.setdefault(self.options.token_text(one), _finite(logprob))
        return by_text


class ChatAnswer(Answer):
    """Answer of ``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"

    def _next(self, piece: Piece) -> dict[str, Any]:
        # The role comes with the first token and not ahead of it: clients time the first event.
        role = {} if self._has_begun[piece.choice] else {"role": "assistant"}
        text, logprobs = self._take(piece)
        return {"index": piece.choice, "delta": role | {"content": text}, "logprobs": logprobs}

    def _whole_choice(self, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, list[Any]]:
        return {"content": [self._content(token, score) for token, score in tokens if score is not None]}

    def _content(self, token: int, score: TokenScore) -> dict[str, Any]:
        top = [self._token(one, logprob) for one, logprob in score.top]
        return self._token(token, score.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.options.token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)

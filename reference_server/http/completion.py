"""One prompt's completion: tokens from the engine become pieces of text; and several completions side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

import msgspec

from helixbench.reference_server.http.detokenizer import Detokenizer, StopStrings
from helixbench.reference_server.http.engine_protocol import EngineLike, EngineUnavailable, RequestRefused, TokenOut
from helixbench.solver.scheduling.work import SamplingParams

if TYPE_CHECKING:
    from helixbench.reference_server.http.metrics import Metrics


class Piece(msgspec.Struct, frozen=True):
    """What one output token adds to the text of prompt ``index``; ``finish_reason`` with the last one."""

    index: int
    text: str
    finish_reason: str | None = None


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready to be run."""

    index: int
    tokens: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]


async def complete(
    engine: EngineLike, prompt: Prompt, *, decode: Callable[[list[int]], str], metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """One piece per output token. Closing it aborts the request.

    Raises:
        RequestRefused: before the first piece.
        EngineUnavailable: at any time.
    """
    arrival_s = time.perf_counter()
    first_s = 0.0
    num_tokens = 0
    outcome = "aborted"
    metrics.in_flight.inc()
    try:
        tokens = engine.generate(
            prompt.tokens,
            max_tokens=prompt.max_tokens,
            sampling=prompt.sampling,
            stop_token_ids=prompt.stop_token_ids,
        )
        async with aclosing(tokens), aclosing(_pieces(tokens, prompt, decode)) as pieces:
            async for piece in pieces:
                num_tokens += 1
                if num_tokens == 1:
                    first_s = time.perf_counter()
                    metrics.ttft_s.observe(first_s - arrival_s)
                    metrics.prompt_tokens.inc(len(prompt.tokens))
                metrics.output_tokens.inc()
                if piece.finish_reason is not None:
                    outcome = piece.finish_reason
                    if num_tokens > 1:
                        metrics.tpot_s.observe((time.perf_counter() - first_s) / (num_tokens - 1))
                yield piece
    except RequestRefused:
        outcome = "refused"
        raise
    except Exception:
        outcome = "failed"
        raise
    finally:
        metrics.in_flight.dec()
        metrics.requests.labels(outcome).inc()


async def _pieces(
    tokens: AsyncIterator[TokenOut], prompt: Prompt, decode: Callable[[list[int]], str]
) -> AsyncGenerator[Piece, None]:
    detokenizer = Detokenizer(decode, prompt.tokens)
    stops = StopStrings(prompt.stop)
    async for out in tokens:
        is_stop_token = out.reason == "stop"  # its text is no part of the answer
        text = "" if is_stop_token else detokenizer.push(out.token)
        if out.finished:
            text += detokenizer.flush()
        certain, is_stopped = stops.push(text)
        if is_stopped:
            yield Piece(prompt.index, certain, "stop")
            return
        if out.finished:
            yield Piece(prompt.index, certain + stops.flush(), out.reason)
            return
        yield Piece(prompt.index, certain)
    raise EngineUnavailable("the engine ended a request before its last token")


class SideBySide:
    """Pieces of several completions in the order in which they come. Closing it aborts those that still run."""

    def __init__(self, completions: Iterable[AsyncGenerator[Piece, None]]) -> None:
        self._arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()  # None: one completion has ended
        self._tasks = [asyncio.create_task(self._run(completion)) for completion in completions]
        self._num_running = len(self._tasks)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
            RequestRefused, EngineUnavailable: as the completion that failed first.
        """
        while self._num_running:
            arrived = await self._arrived.get()
            if isinstance(arrived, Exception):
                raise arrived
            if arrived is not None:
                return arrived
            self._num_running -= 1
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Abort those that still run; they end in their own time."""
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        """Abort those that still run and wait until they have ended."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, completion: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(completion):
                async for piece in completion:
                    self._arrived.put_nowait(piece)
        except Exception as error:
            self._arrived.put_nowait(error)
        else:
            self._arrived.put_nowait(None)

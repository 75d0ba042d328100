"""One output: tokens from the engine become pieces of text; and several outputs side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Self

import msgspec

from helixbench.reference_server.http.detokenizer import StopMatcher, StopStrings
from helixbench.reference_server.http.engine_protocol import EngineLike, EngineUnavailable, RequestRefused, TokenOut
from helixbench.reference_server.http.metrics import Metrics
from helixbench.reference_server.http.openai.answers import Piece
from helixbench.reference_server.http.text import Text
from helixbench.solver.scheduling.requests import Request

PIECES_AT_ONCE = 4


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One output to generate: choice number ``choice`` of its answer."""

    choice: int
    request: Request
    stop: StopStrings
    skip_special_tokens: bool
    is_empty: bool  # the prompt is to be scored, and the one token that the engine generates left out


async def generate(
    engine: EngineLike, output: Output, *, client: object, text: Text, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """One piece per output token. Closing it aborts the request.

    Raises:
        RequestRefused: before the first piece.
        EngineUnavailable, RequestFailed: at any time.
    """
    watch = metrics.begin(num_prompt_tokens=len(output.request.prompt), now_s=time.perf_counter())
    outcome = "aborted"
    try:
        tokens = engine.generate(output.request, client=client)
        async with aclosing(tokens), aclosing(_pieces(tokens, output, text)) as pieces:
            async for piece in pieces:
                watch.token(time.perf_counter())
                outcome = piece.finish_reason or outcome
                yield piece
    except RequestRefused:
        outcome = "refused"
        raise
    except Exception:
        outcome = "failed"
        raise
    finally:
        watch.end(outcome, time.perf_counter())


async def _pieces(tokens: AsyncIterator[TokenOut], output: Output, text: Text) -> AsyncGenerator[Piece, None]:
    detokenizer = text.detokenizer(output.request.prompt, skip_special_tokens=output.skip_special_tokens)
    stop = StopMatcher(output.stop)
    num_tokens = 0
    async for out in tokens:
        if output.is_empty:
            yield Piece(output.choice, None, "", "length", out.scores)
            return
        num_tokens += 1
        is_stop_token = out.reason == "stop"  # its text is no part of the answer
        new = "" if is_stop_token else detokenizer.push(out.token)
        if out.finished:
            new += detokenizer.flush()
        # Text of the first min_tokens tokens neither stops the output nor is the beginning of what does.
        certain, is_stopped = (new, False) if num_tokens <= output.request.min_tokens else stop.push(new)
        if is_stopped:
            yield Piece(output.choice, out.token, certain, "stop", out.scores)
            return
        if out.finished:
            yield Piece(output.choice, out.token, certain + stop.flush(), out.reason, out.scores)
            return
        yield Piece(output.choice, out.token, certain, None, out.scores)
    raise EngineUnavailable("the engine ended a request before its last token")


class SideBySide:
    """Pieces of several outputs in the order in which they come. Closing it aborts those that still run."""

    def __init__(self, outputs: Iterable[AsyncGenerator[Piece, None]]) -> None:
        self._arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()  # None: one output has ended
        self._tasks = [asyncio.create_task(self._run(output)) for output in outputs]
        self._num_running = len(self._tasks)
        self._num_given = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
            RequestRefused, RequestFailed, EngineUnavailable: as the output that failed first.
        """
        self._num_given += 1
        if self._num_given % PIECES_AT_ONCE == 0:  # what lies in the queue is had without a pause for others
            await asyncio.sleep(0)
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

    async def _run(self, output: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(output):
                async for piece in output:
                    self._arrived.put_nowait(piece)
        except Exception as error:
            self._arrived.put_nowait(error)
        else:
            self._arrived.put_nowait(None)

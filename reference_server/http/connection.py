"""One HTTP connection: what it brings, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from helixbench.reference_server.http.protocol import ProtocolError

ResultT = TypeVar("ResultT")

MAX_BODY_BYTES = 32 * 2**20


class ClientGone(Exception):  # noqa: N818 - not an error
    """The client closed its connection."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, which is cancelled when the client closes its connection.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ProtocolError: 413, larger than ``MAX_BODY_BYTES``.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)

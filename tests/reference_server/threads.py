"""Agents that run in threads of this process, for tests that look inside them or speed them up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helixbench.reference_server.launch.agent import profiling_handlers
from helixbench.reference_server.node.agent import Agent, AgentConfig
from helixbench.reference_server.profiling.links import IperfServers
from helixbench.reference_server.wire.keys import load_key_file
from helixbench.reference_server.wire.messages import Done, Shutdown, decode_answer
from helixbench.reference_server.wire.transport import Transport, send

MEMORY_BYTES = 500_000_000.0
END_MS = 30_000


@contextmanager
def agent_in_thread(key_file: Path, *, memory_bytes: float = MEMORY_BYTES) -> Iterator[Agent]:
    """An agent that serves until the block ends."""
    config = AgentConfig(listen="127.0.0.1:0", key=key_file, memory_bytes=memory_bytes)
    made: queue.Queue[Agent] = queue.Queue()
    servers = IperfServers()

    def run() -> None:
        made.put(own := Agent(config, profiling_handlers(servers)))
        own.serve()

    thread = threading.Thread(target=run)
    thread.start()
    agent = made.get(timeout=END_MS / 1e3)
    transport = Transport(load_key_file(key_file))
    try:
        yield agent
    finally:
        farewell = transport.connect(agent.address)
        send(farewell, Shutdown())
        ended = farewell.poll(END_MS) and isinstance(decode_answer(farewell.recv_multipart()[0]), Done)
        transport.close()
        thread.join()
        servers.close()
        agent.close()
        assert ended, "the agent did not end when it was told to"


@contextmanager
def agents_in_threads(nodes: Sequence[str], key_file: Path) -> Iterator[dict[str, str]]:
    """Node -> address."""
    with ExitStack() as stack:
        yield {node: stack.enter_context(agent_in_thread(key_file)).address for node in nodes}

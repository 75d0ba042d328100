"""Event loop against SimPy: one ring of nodes that pass messages, the same number of events each, interleaved.

Run: ``python -m benchmarks.simulation_kernel [events]``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any

import simpy

from helixbench.solver.simulation.event_loop import ARRIVAL, EventLoop

NODES = 24
ROUNDS = 5


def own(events: int) -> float:
    """CPU seconds of the event loop for this number of events."""
    kernel = EventLoop()

    def arrive(number: int) -> None:
        kernel.at(kernel.now_s + 0.001 + number * 1e-6, ARRIVAL, arrive, (number + 1) % NODES)

    for number in range(NODES):
        kernel.at(0.0, ARRIVAL, arrive, number)
    began = time.process_time()
    kernel.run(events)
    return time.process_time() - began


def with_simpy(events: int) -> float:
    """CPU seconds of SimPy for this number of events: one process per message, one timeout per hop."""
    env = simpy.Environment()

    def message(number: int) -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(0.001 + number * 1e-6)
            number = (number + 1) % NODES

    for number in range(NODES):
        env.process(message(number))
    began = time.process_time()
    for _ in range(events):
        env.step()
    return time.process_time() - began


def main(events: int) -> None:
    """Print events/s of both and their ratio, interleaved."""
    ratios = []
    for _ in range(ROUNDS):
        mine, theirs = own(events), with_simpy(events)
        ratios.append(theirs / mine)
        print(f"kernel {events / mine:9.0f} events/s   SimPy {events / theirs:9.0f} events/s   {ratios[-1]:.2f} times")
    print(f"median {sorted(ratios)[ROUNDS // 2]:.2f} times")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)

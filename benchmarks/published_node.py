"""What runs in the published simulator: GPUs as its sources describe them, a node's queues and batches, a link."""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path

COPY_S_PER_BYTE = 1 / 4e9 + 1 / 5e9
MAX_CONTEXT_PER_DECODE = 1000
BLOCK_TOKENS = 16

Table = list[tuple[float, float]]


@dataclass(frozen=True)
class Device:
    """What the published sources say of a GPU with LLaMA-2 70B, by number of layers held, 1 first."""

    kv_blocks: tuple[int, ...]
    decodes: tuple[int, ...]
    prompts: int


DEVICES = {
    "A100": Device(
        (498326, 236107, 148700, 104997, 78775, 61294, 48807, 39442, 32158, 26331, 21564, 17591),
        (480,) * 9 + (450, 380, 300),
        3,
    ),
    "L4": Device((266146, 121017, 71296, 46944, 32333, 22592, 15634), (380,) * 6 + (280,), 1),
    "T4": Device((155320, 63484, 32872, 17566), (300,) * 4, 1),
}


class Request:
    """One request; ``hops`` are (node, first layer), ``links`` those taken, the last one back to the coordinator."""

    __slots__ = ("context", "hops", "issued_s", "links", "output_left", "place", "prompt", "tokens")

    def __init__(self, prompt: int, output: int) -> None:
        self.prompt, self.output_left = prompt, output
        self.tokens, self.context = prompt, 0
        self.place = 0
        self.issued_s = 0.0
        self.hops: list[tuple[Node, int]] = []
        self.links: list[Link] = []


class Link:
    """A link on which one request at a time is sent."""

    __slots__ = ("bytes_per_token", "capacity", "dst", "flow", "free_s", "latency_s", "load", "on_way", "rate")

    def __init__(self, dst: Node | None, bytes_per_token: float, flow: float, latency_s: float) -> None:
        self.dst, self.bytes_per_token, self.flow, self.latency_s = dst, bytes_per_token, flow, latency_s
        self.rate = 0.0
        self.free_s = 0.0
        self.load = 0.0
        self.on_way: deque[tuple[float, Request]] = deque()

    def arrival_s(self, request: Request, now: float) -> float:
        """Send a request; when it is there."""
        self.free_s = max(now, self.free_s) + request.tokens * self.bytes_per_token / self.rate
        return self.free_s + self.latency_s


class Node:
    """A node with its queues."""

    def __init__(self, name: str, device: Device, start: int, end: int, times: tuple[list[float], Table]) -> None:
        self.name, self.start, self.end = name, start, end
        layers = end - start
        self.decode_s, self.prompt_s = times
        self.max_prompts, self.max_decodes = device.prompts, device.decodes[layers - 1]
        self.kv_total = device.kv_blocks[layers - 1] * BLOCK_TOKENS * layers
        self.kv_left = float(self.kv_total)
        self.prompts: list[list[Request]] = [[] for _ in range(layers)]
        self.decodes: list[list[Request]] = [[] for _ in range(layers)]
        self.layer = 0
        self.batch: tuple[list[Request], list[Request]] | None = None
        self.copied_tokens = 0
        self.ins: list[Link] = []
        self.outs: list[Link] = []
        self.wake_s = float("inf")
        self.busy_s = 0.0

    def receive(self, now: float) -> None:
        """Put what has arrived into the queues."""
        arrived: list[tuple[float, Request]] = []
        for link in self.ins:
            while link.on_way and link.on_way[0][0] <= now:
                arrived.append(link.on_way.popleft())
        if len(self.ins) > 1:
            arrived.sort(key=lambda item: item[0])
        for _, request in arrived:
            layer = request.hops[request.place][1] - self.start
            (self.decodes if request.context else self.prompts)[layer].append(request)
            self.copied_tokens += request.tokens

    def start_batch(self) -> float:
        """Take what waits at this layer, or at the next where anything waits; seconds of the batch, 0 for none."""
        if not (self.prompts[self.layer] or self.decodes[self.layer]):
            self.advance()
        prompts, decodes = self.prompts[self.layer], self.decodes[self.layer]
        if not (prompts or decodes):
            return 0.0
        taken = prompts[: self.max_prompts]
        self.prompts[self.layer] = prompts[self.max_prompts :]
        chosen, left = self._fitting(decodes)
        self.decodes[self.layer] = left
        self.batch = (taken, chosen)
        seconds = self.decode_s[len(chosen)] * (2 if len(chosen) == 1 else 1)
        if taken:
            seconds += interpolated(self.prompt_s, sum(request.tokens for request in taken))
        if self.layer == 0:
            seconds += self.copied_tokens * self.activation_bytes * COPY_S_PER_BYTE
            self.copied_tokens = 0
        self.busy_s += seconds
        return seconds

    activation_bytes = 16384.0

    def _fitting(self, decodes: list[Request]) -> tuple[list[Request], list[Request]]:
        most = self.max_decodes * MAX_CONTEXT_PER_DECODE
        if len(decodes) <= self.max_decodes and sum(request.context for request in decodes) <= most:
            return decodes, []
        chosen: list[Request] = []
        left: list[Request] = []
        context = 0
        for request in decodes:
            if len(chosen) < self.max_decodes and context + request.context <= most:
                chosen.append(request)
                context += request.context
            else:
                left.append(request)
        return chosen, left

    def advance(self) -> None:
        """On to the next layer, in turn, at which anything waits."""
        count = len(self.prompts)
        for step in range(1, count):
            layer = (self.layer + step) % count
            if self.prompts[layer] or self.decodes[layer]:
                self.layer = layer
                return


def interpolated(table: Table, x: float) -> float:
    """Seconds at that many tokens, on straight lines between the rows."""
    at = bisect_right(table, (x, float("inf")))
    x0, y0 = table[at - 1]
    if at == len(table):
        if x > x0:
            raise ValueError(f"{x} tokens are beyond the timings, which end at {x0}")
        return y0
    x1, y1 = table[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def read_table(path: Path) -> Table:
    """(tokens, seconds) of one layer."""
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
    return [(float(tokens), float(ms) / 1000) for tokens, ms in rows]

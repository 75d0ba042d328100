"""Two fixed pieces of work, timed again and again: how fast this processor is right now; see ``processor_speed``."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import linear

from helixbench.profiler.measure.processor_speed import ProcessorSpeed

_TOKENS, _WIDTH, _ROWS = 6, 512, 704
_MATRICES = 22  # 32 MB of weights, 1.4 MB at a time, as a stage streams its own
_SIDE = 128
_WARM_UP = 5
_WARM_UP_ROWS = 32


class ReferenceKernel:
    """Work for one thread; its time is a measure of the processor, not of any model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._matrices = [torch.randn(_ROWS, _WIDTH, generator=generator) for _ in range(_MATRICES)]
        self._inputs = torch.randn(_TOKENS, _WIDTH, generator=generator)
        self._square = torch.randn(_SIDE, _SIDE, generator=generator)
        self._next = 0
        for _ in range(_WARM_UP):
            self.speed()

    @torch.inference_mode()
    def speed(self) -> ProcessorSpeed:
        """CPU time that the work takes now."""
        linear(self._inputs, self._matrices[self._next - 1][:_WARM_UP_ROWS])  # what ran before drove the code out
        begin = time.thread_time()
        linear(self._inputs, self._matrices[self._next])
        middle = time.thread_time()
        torch.mm(self._square, self._square)
        end = time.thread_time()
        self._next = (self._next + 1) % _MATRICES
        return ProcessorSpeed(weights_s=middle - begin, matmul_s=end - middle)

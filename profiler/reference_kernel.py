"""How fast this processor is right now: a fixed piece of work, in proportion like an iteration, timed again and again.

A processor that others share (a virtual machine's neighbours, a sibling thread, a common memory bus) is not equally
fast at all times, and a profile made in a fast hour does not hold in a slow one. The kernel tells the two apart: it is
a matrix product that streams weights, as a stage does, and one that stays in the cache, about as long each. Measured on
a virtual machine with two cores: over spans of 18 s the time of a stage's iterations varied by 4.7 %, relative to these
two by 2.2 %; while another stage ran on the other core, it took 2 to 4 % longer, and these two 2 to 5 %.
"""

from __future__ import annotations

import time

import torch

_TOKENS, _WIDTH, _COLUMNS, _SLICES = 6, 512, 160, 48  # 16 MB of weights, a slice at a time, as a stage streams its own
_SMALL = 128
_WARM_UP = 5


class ReferenceKernel:
    """A fixed piece of work for one thread; its time is a measure of the processor, not of any model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = [torch.randn(_WIDTH, _COLUMNS, generator=generator) for _ in range(_SLICES)]
        self._inputs = torch.randn(_TOKENS, _WIDTH, generator=generator)
        self._small = torch.randn(_SMALL, _SMALL, generator=generator)
        self._next = 0
        for _ in range(_WARM_UP):
            self.time_s()

    @torch.inference_mode()
    def time_s(self) -> float:
        """Seconds of CPU time that the work takes now."""
        begin = time.thread_time()
        self._next = (self._next + 1) % _SLICES
        torch.mm(self._inputs, self._weights[self._next])
        torch.mm(self._small, self._small)
        return time.thread_time() - begin

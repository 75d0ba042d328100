"""Emulated devices: a node's results are released when the device that it stands for would have them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import Device, ModelFacts
from helixbench.profiler.emulated_device import EmulatedDevice, StageTimes, load_device
from helixbench.reference_server.wire.messages import Description
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.work import WorkItem

SPIN_S = 0.0003
"""The last part of a wait, for which a thread asks the clock: the kernel wakes it 0.05 to 0.2 ms after its time."""


Shape: TypeAlias = Iterable[tuple[int, WorkItem]]
"""What an iteration ran, each with the layer at which it entered the stage."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How time passes on a testbed.

    ``time_scale`` seconds by the wall clock stand for one of the devices'. ``latency_s`` maps sender -> receiver ->
    what a message takes beyond the network's own time, in the devices' time.
    """

    time_scale: float = 1.0
    latency_s: dict[str, dict[str, float]] = {}

    def held_s(self, sender: str) -> dict[str, float]:
        """Receiver -> seconds, by the wall clock, that messages of that sender are held."""
        return {name: self.time_scale * latency_s for name, latency_s in self.latency_s.get(sender, {}).items()}


class RealDevice:
    """A node's own device: an iteration ends when it ends.

    Attributes:
        time_scale: seconds here that stand for one of the device's.
        late_iterations: those that took longer here than the device would have.
        release_error_s: sum over all other iterations of the seconds, here, from when one was due to its release.
    """

    time_scale = 1.0
    late_iterations = 0
    release_error_s = 0.0

    def load(self, model: ModelFacts, held: LayerRange, *, seed: str) -> None:
        """A stage of that model is loaded."""

    def set_speed(self, factor: float) -> None:  # noqa: ARG002 - of emulated devices
        """Iterations take this many times what the device takes, from now on.

        Raises:
            InputError: not an emulated device.
        """
        raise InputError("speed: this node is a real device, which takes what it takes")

    def finish(self, begin_s: float, shape: Shape) -> None:
        """An iteration has been computed. Returns when it is over.

        Args:
            begin_s: when it began, by ``time.perf_counter``.
            shape: what ran.
        """


class EmulatedNode(RealDevice):
    """A node that keeps an emulated device's times.

    Args:
        device: the device.
        time_scale: see ``RealDevice``.
        clock: seconds, never falling.
        sleep: waits that many seconds or a little longer.
    """

    def __init__(
        self,
        device: EmulatedDevice,
        *,
        time_scale: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._device = device
        self.time_scale = time_scale
        self._clock, self._sleep = clock, sleep
        self._seconds: Callable[[Shape], float] | None = None  # what an iteration takes on the device
        self._factor = 1.0  # times which it takes at present

    def describe(self, memory_bytes: float | None) -> Device:
        """The device as the node has it, with that much memory or its own."""
        return self._device.describe(memory_bytes=memory_bytes)

    def stage_times(self, model: ModelFacts) -> StageTimes:
        """The device's stage times for a model; see ``EmulatedDevice.stage_times``."""
        return self._device.stage_times(model)

    def load(self, model: ModelFacts, held: LayerRange, *, seed: str) -> None:
        """From now on iterations take what the device takes for these layers.

        Raises:
            InputError: the device has no times for the model.
        """
        from helixbench.solver.simulation.stage_time import StageTimer, counts_by_entry

        cost = self._device.stage_times(model).cost.stage
        timer = StageTimer(cost, held, num_layers=model.num_layers, seed=seed)

        self._seconds = lambda shape: timer.seconds(counts_by_entry(shape))
        self._factor = 1.0
        self.late_iterations, self.release_error_s = 0, 0.0

    def set_speed(self, factor: float) -> None:
        """Iterations take this many times what the device takes, from now on."""
        if not 0 < factor < math.inf:
            raise InputError(f"speed: need a finite factor > 0, got {factor:g}")
        self._factor = factor

    def finish(self, begin_s: float, shape: Shape) -> None:
        """Wait until the device would have ended; count the iteration as late where that is past."""
        assert self._seconds is not None, "nothing is loaded"
        due_s = begin_s + self.time_scale * self._factor * self._seconds(shape)
        if self._clock() > due_s:
            self.late_iterations += 1
            return
        while (left_s := due_s - self._clock()) > SPIN_S:
            self._sleep(left_s - SPIN_S)
        while (now_s := self._clock()) < due_s:
            pass
        self.release_error_s += now_s - due_s


def require_time_scale(described: Mapping[str, Description], timing: Timing) -> None:
    """Check that all agents keep the testbed's time scale.

    Raises:
        InputError: one was started with another.
    """
    for name, answer in described.items():
        if answer.time_scale != timing.time_scale:
            raise InputError(
                f"node {name}: its agent was started with a time scale of {answer.time_scale:g}, but the testbed file "
                f"says {timing.time_scale:g}; start it with --time-scale {timing.time_scale:g}, or change the file"
            )


def make_device(device_file: Path | None, *, time_scale: float) -> RealDevice:
    """The device of a node: its own, or the one of that file.

    Raises:
        InputError: the file cannot be read or is no device file.
    """
    if device_file is None:
        return RealDevice()
    return EmulatedNode(load_device(device_file), time_scale=time_scale)

"""When an emulated node releases its results, on a clock that only its own waiting moves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import Device, ModelFacts
from helixbench.profiler.cost.model import BatchShape
from helixbench.profiler.emulated_device import EmulatedDevice, Roofline
from helixbench.records import save_record
from helixbench.reference_server.testbed.emulation import (
    SPIN_S,
    EmulatedNode,
    RealDevice,
    Timing,
    make_device,
    require_time_scale,
)
from helixbench.reference_server.wire.messages import Description
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.work import WorkItem

FACTS = ModelFacts(
    name="small",
    num_layers=8,
    activation_bytes_per_token=200.0,
    token_bytes=4.0,
    layer_weight_bytes=2e6,
    kv_bytes_per_token_per_layer=100.0,
    dtype="float16",
)
DEVICE = EmulatedDevice(
    name="made-up",
    memory_bytes=1e9,
    roofline=Roofline(flops=2e9, memory_bandwidth_bytes_per_s=1e9, launch_s=0.01, step_s=0.1),
)
COST = DEVICE.stage_times(FACTS).cost.stage
DECODE = WorkItem(1, 7, 1, sample=True, is_decode=True)
TICK_S = 1e-5


class Clock:
    """Every look costs a little; sleeping takes ``oversleep_s`` longer than asked for."""

    def __init__(self, *, oversleep_s: float = 0.0) -> None:
        self.now_s = 50.0
        self.oversleep_s = oversleep_s
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now_s += TICK_S
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds + self.oversleep_s


def node_of(clock: Clock, *, held: LayerRange, time_scale: float = 1.0) -> EmulatedNode:
    node = EmulatedNode(DEVICE, time_scale=time_scale, clock=clock, sleep=clock.sleep)
    node.load(FACTS, held, seed="n")
    return node


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
def test_a_result_is_released_when_the_device_would_have_it(time_scale: float) -> None:
    clock = Clock(oversleep_s=0.0002)
    node = node_of(clock, held=LayerRange(2, 6), time_scale=time_scale)
    begin_s = clock.now_s
    clock.now_s += 0.05  # the node's own work

    node.finish(begin_s, [(2, DECODE)])

    batch = BatchShape(decode_tokens=1, decode_context_tokens=8, sampled_tokens=1)
    due_s = begin_s + time_scale * COST.time_s(num_layers=4, batch=batch, first=False, last=False)
    assert due_s <= clock.now_s <= due_s + 2 * TICK_S
    assert node.release_error_s == pytest.approx(clock.now_s - due_s)
    assert node.late_iterations == 0
    assert len(clock.slept) == 1, "and then it looks at the clock"
    assert clock.slept[0] == pytest.approx(due_s - SPIN_S - begin_s - 0.05, abs=1e-4)


def test_an_iteration_that_took_longer_than_on_the_device_is_late_and_not_held() -> None:
    clock = Clock()
    node = node_of(clock, held=LayerRange(0, 8))
    begin_s = clock.now_s
    clock.now_s += 10.0

    node.finish(begin_s, [(0, DECODE)])

    assert (node.late_iterations, node.release_error_s, clock.slept) == (1, 0.0, [])


def test_each_layer_is_charged_for_the_tokens_that_run_it() -> None:
    """One sequence enters at the first layer of the range, eight more at its last but one."""
    clock = Clock()
    node = node_of(clock, held=LayerRange(0, 8))
    late = [WorkItem(number, 7, 1, sample=True, is_decode=True) for number in range(8)]
    begin_s = clock.now_s

    node.finish(begin_s, [*((6, item) for item in late), (0, DECODE)])

    one, nine = (BatchShape(decode_tokens=n, decode_context_tokens=8 * n, sampled_tokens=n) for n in (1, 9))
    first = COST.scope_s("embedding", one)
    expected_s = first + 6 * COST.scope_s("layer", one) + COST.time_s(num_layers=2, batch=nine, first=False, last=True)
    assert clock.now_s - begin_s == pytest.approx(expected_s, abs=3 * TICK_S)
    assert expected_s < COST.time_s(num_layers=8, batch=nine, first=True, last=True) - 0.01


def test_counts_begin_with_the_stage() -> None:
    clock = Clock()
    node = node_of(clock, held=LayerRange(0, 8))
    node.finish(clock.now_s - 10.0, [(0, DECODE)])
    node.load(FACTS, LayerRange(0, 4), seed="n")
    assert node.late_iterations == 0


def test_a_nodes_own_device_holds_nothing_back() -> None:
    real = make_device(None, time_scale=1.0)
    real.load(FACTS, LayerRange(0, 8), seed="n")
    real.finish(0.0, [(0, DECODE)])
    assert type(real) is RealDevice
    assert (real.time_scale, real.late_iterations, real.release_error_s) == (1.0, 0, 0.0)


def test_a_device_file_makes_an_emulated_node(tmp_path: Path) -> None:
    save_record(tmp_path / "device.json", DEVICE)
    made = make_device(tmp_path / "device.json", time_scale=3.0)
    assert isinstance(made, EmulatedNode)
    assert made.time_scale == 3.0
    assert made.describe(None).label == "made-up (emulated, data sheet)"


def test_latencies_are_held_at_the_time_scale() -> None:
    timing = Timing(time_scale=4.0, latency_s={"a": {"b": 0.05}})
    assert timing.held_s("a") == {"b": 0.2}
    assert timing.held_s("b") == {}


def test_an_agent_of_another_time_scale_is_refused() -> None:
    answer = Description(device=Device(kind="cpu", name="x", memory_bytes=1e9), versions={}, machine={})
    require_time_scale({"a": answer}, Timing())
    other = msgspec.structs.replace(answer, time_scale=2.0)
    with pytest.raises(InputError, match=r"node b: its agent was started with a time scale of 2, but .* says 1"):
        require_time_scale({"a": answer, "b": other}, Timing())

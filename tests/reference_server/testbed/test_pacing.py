import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from helixbench.profiler.measure.processor_speed import ProcessorSpeed
from helixbench.reference_server.profiling.loopback import Ring
from helixbench.reference_server.testbed import pacing
from helixbench.reference_server.testbed.pacing import Pacer, take_short_turns

ROOM = 1.35
"""An iteration takes so many times as long on the processor that shares are of."""


class FakeKernel:
    """A processor whose speed the test sets."""

    def __init__(self) -> None:
        self.now = ProcessorSpeed(weights_s=1e-4, matmul_s=2e-4)
        self.num_runs = 0
        self.takes_s = 0.0

    def speed(self) -> ProcessorSpeed:
        self.num_runs += 1
        spin(self.takes_s)
        return self.now


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(pacing, "ReferenceKernel", lambda: fake)
    return fake


def spin(cpu_s: float) -> None:
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


def held_s(pacer: Pacer, cpu_s: float) -> float:
    """Wall seconds of an iteration of so much CPU time, over its CPU time."""
    pacer.forget()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    spin(cpu_s)
    used = time.process_time() - begin_cpu
    pacer.hold(begin)
    return (time.perf_counter() - begin) / used


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_an_iteration_takes_its_cpu_time_over_the_share(kernel: FakeKernel, share: float) -> None:
    assert kernel.now
    assert held_s(Pacer(share), 0.03) == pytest.approx(ROOM / share, rel=0.1)


@pytest.mark.parametrize(("share", "waits_for"), [(0.1, 0.2), (0.8, 0.6)])
def test_a_profiled_node_waits_for_another_share_and_counts_what_its_own_takes(
    kernel: FakeKernel, share: float, waits_for: float
) -> None:
    assert kernel.now
    pacer = Pacer(share)
    pacer.profiling(True)

    waited = held_s(pacer, 0.03)

    assert waited == pytest.approx(ROOM / waits_for, rel=0.1)
    skipped = pacer.skipped_s / 0.03
    assert waited + skipped == pytest.approx(ROOM / share, rel=0.1), "together the time at the own share"
    pacer.profiling(False)
    assert held_s(pacer, 0.01) == pytest.approx(ROOM / share, rel=0.1)
    assert pacer.skipped_s / 0.03 == skipped


def test_what_a_profiled_node_overruns_its_pace_by_counts(kernel: FakeKernel) -> None:
    """So it does when it serves."""
    assert kernel.now
    pacer = Pacer(0.8)
    pacer.profiling(True)
    pacer.forget()
    begin = time.perf_counter() - 10.0
    spin(0.01)
    pacer.hold(begin)
    assert time.perf_counter() - begin == pytest.approx(10.0, abs=0.1)
    assert pacer.skipped_s == 0.0


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_machine_that_has_become_slower_or_faster_does_not_change_the_node(kernel: FakeKernel, slower: float) -> None:
    pacer = Pacer(0.5)
    kernel.now = ProcessorSpeed(weights_s=1e-4 * slower, matmul_s=2e-4 * slower)

    for _ in range(6):
        held_s(pacer, 0.01)
    assert held_s(pacer, 0.04) == pytest.approx(ROOM * 2 / slower**0.75, rel=0.1)
    mean = pacer.mean_speed()
    assert mean is not None
    assert (mean.weights_s, mean.matmul_s) == pytest.approx((kernel.now.weights_s, kernel.now.matmul_s))
    assert pacer.mean_speed() is None


def test_the_speed_is_looked_at_between_parts_of_an_iteration_now_and_then(kernel: FakeKernel) -> None:
    kernel.takes_s = 0.01
    pacer = Pacer(0.1)
    pacer.leave_out(lambda: spin(0.03))
    pacer.forget()
    begin = time.perf_counter()
    before = kernel.num_runs
    for _ in range(15):
        pacer.look()
        spin(0.002)
    looks = kernel.num_runs - before
    pacer.hold(begin)
    took_s = time.perf_counter() - begin

    assert looks == 7, "before every second of its parts: once for every 3 ms of work"
    assert took_s == pytest.approx(ROOM * 0.03 / 0.1, rel=0.15), "the kernel's own time is no part of the iteration"


def test_what_is_left_out_belongs_to_no_iteration(kernel: FakeKernel) -> None:
    assert kernel.now
    pacer = Pacer(0.25)
    pacer.forget()
    pacer.leave_out(lambda: spin(0.02))
    begin = time.perf_counter()
    pacer.hold(begin)
    assert time.perf_counter() - begin < 0.02


def test_cpu_time_beside_iterations_counts_and_loading_does_not(kernel: FakeKernel) -> None:
    assert kernel.now
    pacer = Pacer(0.25)
    pacer.forget()
    spin(0.02)  # as receiving does, before the iteration begins

    begin = time.perf_counter()
    pacer.hold(begin)
    with_receiving = time.perf_counter() - begin
    spin(0.02)
    pacer.forget()
    begin = time.perf_counter()
    pacer.hold(begin)
    after_loading = time.perf_counter() - begin

    assert with_receiving == pytest.approx(ROOM * 0.08, rel=0.15)
    assert after_loading < 0.02


def test_what_runs_alone_is_held_for_its_own_cpu_time_only(kernel: FakeKernel) -> None:
    """Not what holding back took, the sampler's work between two iterations, the first use of the code."""
    assert kernel.now
    ring = object.__new__(Ring)
    ring._agent = SimpleNamespace(pacer=Pacer(0.25))  # type: ignore[assignment]
    iterate = ring._paced(lambda: spin(0.005), rehearse=lambda: spin(0.003))

    iterate()
    spin(0.05)
    begin = time.perf_counter()
    iterate()

    assert time.perf_counter() - begin == pytest.approx(ROOM * 0.005 / 0.25, rel=0.3)


def test_nominal_speed_is_the_mean_of_what_is_measured_and_far_outliers_count_little(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "NOMINAL_S", 0.01)
    pacer = Pacer(0.5)
    usual = ProcessorSpeed(weights_s=3e-4, matmul_s=3e-4)
    begin, count = time.perf_counter(), itertools.count()

    def iterate() -> None:
        kernel.now = ProcessorSpeed(weights_s=3e-3, matmul_s=9e-4) if next(count) % 3 == 0 else usual
        spin(0.03)
        pacer.hold(begin)

    pacer.measure_nominal(iterate)

    assert (pacer.pace.speed.weights_s, pacer.pace.speed.matmul_s) == pytest.approx((4e-4, 4e-4), rel=0.1)


def test_the_real_kernel_takes_about_as_long_each_time() -> None:
    from helixbench.profiler.measure.reference_kernel import ReferenceKernel

    reference = ReferenceKernel()
    speeds = [reference.speed() for _ in range(50)]

    for times in (sorted(speed.weights_s for speed in speeds), sorted(speed.matmul_s for speed in speeds)):
        assert 1e-6 < times[25] < 1e-2
        assert times[30] < 3 * times[20]


def test_short_turns_are_asked_for_in_a_thread_of_its_own() -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(take_short_turns()))
    thread.start()
    thread.join()

    assert answers in ([True], [False])  # an old kernel, or another processor, offers none: it must not fail

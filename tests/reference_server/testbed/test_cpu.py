import os

import pytest

from helixbench.errors import InputError
from helixbench.reference_server.testbed import cpu


@pytest.mark.parametrize(("quota", "share"), [(None, 1.0), (0.25, 0.25), (1000.0, 1.0)])
def test_a_containers_quota_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, share: float
) -> None:
    monkeypatch.setattr(cpu, "cpu_quota_cores", lambda _: quota)
    cores = len(os.sched_getaffinity(0))
    assert cpu.available_cpus() == (share if share < 1 else cores)


@pytest.mark.parametrize(("text", "cores"), [("", ()), ("3", (3,)), ("0,2-4", (0, 2, 3, 4))])
def test_cores_are_read_as_a_list_of_ranges(text: str, cores: tuple[int, ...]) -> None:
    assert cpu.parse_cpus(text) == cores


@pytest.mark.parametrize("text", ["a", "1,", "2-", "-1", "0;1"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="need cores like 0,2-3"):
        cpu.parse_cpus(text)


def test_a_core_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no core 9999 here"):
        cpu.use_cpus((9999,))

import os
from pathlib import Path

import pytest

from helixbench.reference_server.testbed import cgroup, cpu, isolation, testbed
from tests.reference_server.testbed.beds import small_spec


def fake_v2(tmp_path: Path, *, own: str, mounted: str = "/") -> Path:
    """A /proc and a cgroup2 tree with the CPU controller; the folder that stands for /proc."""
    tree = tmp_path / "cgroup"
    (tree / own.removeprefix(mounted).lstrip("/")).mkdir(parents=True, exist_ok=True)
    (tree / "cgroup.controllers").write_text("cpuset cpu memory\n")
    (tree / "cgroup.subtree_control").write_text("memory\n")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        f"24 1 0:22 / /proc rw - proc proc rw\n30 24 0:26 {mounted} {tree} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    )
    (proc / "self" / "cgroup").write_text(f"0::{own}\n")
    return proc


def fake_v1(tmp_path: Path, *, own: str, mounted: str) -> Path:
    tree = tmp_path / "cpu,cpuacct"
    (tree / own.removeprefix(mounted).lstrip("/")).mkdir(parents=True, exist_ok=True)
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        f"29 24 0:25 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
        f"30 24 0:26 {mounted} {tree} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
    )
    (proc / "self" / "cgroup").write_text(f"4:memory:/else\n3:cpu,cpuacct:{own}\n0::/\n")
    return proc


def test_v2_group_gets_quota_and_controller(tmp_path: Path) -> None:
    controller = cpu.find_cpu_controller(fake_v2(tmp_path, own="/user.slice"))
    assert controller is not None

    path = cgroup.group_path(controller, run_id="ab", index=1)
    cgroup.make_group(controller, path)
    cgroup.limit_cpu(controller, path, 0.45)

    assert controller.version == 2
    assert path == tmp_path / "cgroup" / "helixbench-ab-1"
    assert (path / "cpu.max").read_text() == "9000 20000"
    assert (controller.root / "cgroup.subtree_control").read_text() == "+cpu"


def test_v1_group_gets_quota(tmp_path: Path) -> None:
    controller = cpu.find_cpu_controller(fake_v1(tmp_path, own="/", mounted="/"))
    assert controller is not None

    path = cgroup.group_path(controller, run_id="ab", index=0)
    cgroup.make_group(controller, path)
    cgroup.limit_cpu(controller, path, 0.2)

    assert controller.version == 1
    assert (path / "cpu.cfs_period_us").read_text() == "20000"
    assert (path / "cpu.cfs_quota_us").read_text() == "4000"


def test_real_time_is_granted_where_a_group_needs_a_grant_and_given_back(tmp_path: Path) -> None:
    with_grants, without = tmp_path / "grants", tmp_path / "none"
    with_grants.mkdir()
    without.mkdir()
    runtime, period = with_grants / "cpu.rt_runtime_us", with_grants / "cpu.rt_period_us"
    runtime.write_text("0")

    for group in (with_grants, without):
        cgroup.grant_realtime(group, 0.15)
    assert (runtime.read_text(), period.read_text()) == ("15000", "100000")
    for group in (with_grants, without):
        cgroup.give_realtime_back(group)
    assert runtime.read_text() == "0"
    assert list(without.iterdir()) == []


def test_where_one_node_is_granted_no_real_time_none_keeps_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: dict[Path, float] = {}

    def grant(group: Path, share: float) -> None:
        if len(granted) == 2:
            raise OSError(22, "Invalid argument")
        granted[group] = share

    monkeypatch.setattr(testbed, "make_group", lambda _controller, _group: None)
    monkeypatch.setattr(testbed, "grant_realtime", grant)
    monkeypatch.setattr(testbed, "give_realtime_back", lambda group: granted.pop(group, None))
    run = testbed._Run(small_spec(), folder=tmp_path, log_dir=tmp_path)
    run._groups = {name: tmp_path / name for name in ("coordinator", "big", "small")}
    controller = cpu.CpuController(1, tmp_path, tmp_path)

    made = run._make_groups(isolation.Isolation(controller=controller))

    assert granted == {}
    assert not made.is_realtime
    assert made.no_realtime == "small: Invalid argument"


def test_quota_of_a_group_above_counts_v2(tmp_path: Path) -> None:
    proc = fake_v2(tmp_path, own="/a/b")
    (tmp_path / "cgroup/a/b/cpu.max").write_text("max 100000\n")
    (tmp_path / "cgroup/a/cpu.max").write_text("5000 100000\n")

    assert cpu.available_cpus(proc) == pytest.approx(0.05)


def test_quota_of_a_container_counts_v1(tmp_path: Path) -> None:
    proc = fake_v1(tmp_path, own="/docker/c1", mounted="/docker/c1")
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("30000\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_period_us").write_text("100000\n")

    assert cpu.available_cpus(proc) == pytest.approx(0.3)


def test_no_quota_leaves_the_cores_that_may_be_used(tmp_path: Path) -> None:
    proc = fake_v2(tmp_path, own="/")

    assert cpu.available_cpus(proc) == len(os.sched_getaffinity(0))
    assert cpu.find_cpu_controller(tmp_path / "nothing") is None


def test_group_that_was_never_made_has_no_pids_and_is_removed(tmp_path: Path) -> None:
    assert cgroup.group_pids(tmp_path / "none") == []
    cgroup.remove_group(tmp_path / "none")

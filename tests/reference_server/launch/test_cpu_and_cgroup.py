import os
from pathlib import Path

import pytest

from reference_server.launch import cgroup, cpu


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

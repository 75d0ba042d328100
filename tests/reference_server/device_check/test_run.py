"""Steps of a device's check: each in a process of its own, each result kept, whatever becomes of the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.device_check.record import DeviceCheck, Found
from helixbench.reference_server.device_check.run import check_device
from helixbench.reference_server.device_check.steps import STEPS, Step


def good(device: torch.device, folder: Path) -> Found:
    assert folder.is_dir()
    print("this is not for stdout")
    return Found(f"on {device}", {"tokens": 3.0})


def bad(device: torch.device, folder: Path) -> Found:
    raise MeasurementError("two and two are five\nand more")


def crashes(device: torch.device, folder: Path) -> Found:
    os._exit(7)


def hangs(device: torch.device, folder: Path) -> Found:
    """With a process of its own, which must not outlive it."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["SLEEPER"]).write_text(str(sleeper.pid))
    time.sleep(600)
    raise AssertionError


CASES = {
    "good": Step(good, "it works", 60),
    "bad": Step(bad, "it fails", 60),
    "crashes": Step(crashes, "it ends its process", 60),
    "last": Step(good, "it still runs", 60),
}


def test_each_step_is_judged_by_itself_and_kept_as_it_ends() -> None:
    seen: list[DeviceCheck] = []
    begun: list[str] = []
    found = check_device("cpu", steps=CASES, on_begin=begun.append, on_step=seen.append)

    assert begun == list(CASES)
    assert [step.status for step in found.steps] == ["pass", "fail", "fail", "pass"]
    assert [step.says for step in found.steps] == [
        "on cpu", "two and two are five", "its process ended with exit code 7", "on cpu",
    ]  # fmt: skip
    assert found.steps[0].figures == {"tokens": 3.0}
    assert not found.is_good
    assert [[step.status for step in each.steps].count("not run") for each in seen] == [3, 2, 1, 0]


def test_a_step_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPER", str(tmp_path / "pid"))
    (found,) = check_device("cpu", steps={"hangs": Step(hangs, "it never ends", 20)}).steps
    assert found.status == "over time"
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_only_names_steps() -> None:
    assert [step.name for step in check_device("cpu", only=["last"], steps=CASES).steps] == ["last"]
    with pytest.raises(InputError, match="--only 'none': no such step; there are good"):
        check_device("cpu", only=["none"], steps=CASES)


def test_the_command_prints_the_record_alone_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    words = ("doctor", "--gpu-check", "--device", "cpu", "--only", "facts", "--json", "-o", str(path))
    done = subprocess.run([sys.executable, "-m", "helixbench", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 steps passed" in done.stderr
    import msgspec

    printed = msgspec.json.decode(done.stdout, type=DeviceCheck)
    assert printed.is_good
    assert printed.steps[0].figures["threads"] >= 1
    assert msgspec.json.decode(path.read_bytes(), type=DeviceCheck).steps == printed.steps


def test_every_step_has_a_limit_and_says_what_it_proves() -> None:
    assert all(step.limit_s > 0 and step.proves for step in STEPS.values())

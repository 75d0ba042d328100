"""How the kernel treats threads that wait and threads that compute: asked of the kernel itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helixbench.reference_server.testbed.wakeups import REALTIME_VARIABLE, Wakeups

if sys.platform != "linux":
    pytest.skip("real time as Linux schedules it", allow_module_level=True)

SCRIPT = """
import json, os, sys, threading, time
import zmq
from helixbench.reference_server.testbed.wakeups import Wakeups, _transport_threads

def policy(thread=0):
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK

def of_transport():
    return sorted({policy(thread) for thread in _transport_threads()})

def of_a_new_thread():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(policy()))
    thread.start()
    thread.join()
    return answers[0]

context = zmq.Context()
socket = context.socket(zmq.ROUTER)
socket.bind("tcp://127.0.0.1:*")
until = time.monotonic() + 30
while not _transport_threads() and time.monotonic() < until:
    time.sleep(0.01)  # a thread gives itself its name once it runs
wakeups = Wakeups.granted()
said = {"before": [policy(), of_transport()]}
wakeups.waiting()
said["waiting"] = [policy(), of_transport(), of_a_new_thread()]
wakeups.computing()
said["computing"] = [policy(), of_transport()]
wakeups.transport(is_serving=True)
said["serving"] = [policy(), of_transport()]
wakeups.transport(is_serving=False)
said["resting"] = [policy(), of_transport()]
print(json.dumps(said))
"""
IN_TURN, AT_ONCE = os.SCHED_OTHER, os.SCHED_FIFO
ROOT = Path(__file__).parents[3]


def policies(environment: dict[str, str]) -> dict[str, list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != REALTIME_VARIABLE} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, list[object]] = json.loads(done.stdout)
    return said


def may_be_realtime() -> bool:
    attempt = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", attempt], capture_output=True, check=False).returncode == 0


def test_what_waits_is_woken_at_once_and_what_computes_takes_turns() -> None:
    if not may_be_realtime():
        pytest.skip("needs the right to schedule in real time")
    assert policies({REALTIME_VARIABLE: "1"}) == {
        "before": [IN_TURN, [IN_TURN]],
        "waiting": [AT_ONCE, [IN_TURN], IN_TURN],
        "computing": [IN_TURN, [IN_TURN]],
        "serving": [IN_TURN, [AT_ONCE]],
        "resting": [IN_TURN, [IN_TURN]],
    }


def test_nothing_is_asked_of_the_kernel_where_it_was_not_granted() -> None:
    assert {policy for said in policies({}).values() for policy in _flat(said)} == {IN_TURN}
    assert os.sched_getscheduler(0) == IN_TURN
    Wakeups(is_realtime=False).waiting()
    assert os.sched_getscheduler(0) == IN_TURN


def _flat(said: object) -> list[object]:
    return [said] if not isinstance(said, list) else [policy for part in said for policy in _flat(part)]

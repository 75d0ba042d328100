"""Run the steps, each in a process of its own that is stopped at its limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec

from helixbench.errors import InputError, first_line
from helixbench.records import provenance_now
from helixbench.reference_server.device_check.record import DeviceCheck, Found, StepResult
from helixbench.reference_server.device_check.steps import STEPS, Step

_LEAVE_S = 10.0  # for a step's process to end by itself once it has answered


def check_device(
    device: str,
    *,
    only: Sequence[str] = (),
    steps: Mapping[str, Step] = STEPS,
    on_begin: Callable[[str], None] = lambda _: None,
    on_step: Callable[[DeviceCheck], None] = lambda _: None,
) -> DeviceCheck:
    """Run all steps, one after another, whatever becomes of each.

    Args:
        device: as torch names it: ``cuda:0``, ``cpu``.
        only: names of the steps to run; empty for all.
        steps: name -> step.
        on_begin: told the name of each as it begins.
        on_step: given all that is known after each.

    Raises:
        InputError: no such step.
    """
    if unknown := set(only) - set(steps):
        raise InputError(f"--only {min(unknown)!r}: no such step; there are {', '.join(steps)}")
    chosen = {name: step for name, step in steps.items() if not only or name in only}
    results = {name: StepResult(name=name, proves=step.proves) for name, step in chosen.items()}
    found = DeviceCheck(device=device, steps=tuple(results.values()), provenance=provenance_now())
    for name, step in chosen.items():
        on_begin(name)
        results[name] = _run(name, step, device)
        found = msgspec.structs.replace(found, steps=tuple(results.values()))
        on_step(found)
    return found


def _run(name: str, step: Step, device: str) -> StepResult:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="helixbench-check-") as folder:
        child = context.Process(target=_child, args=(step, device, folder, theirs))
        child.start()
        theirs.close()
        try:
            answered = ours.poll(step.limit_s)
            status, says, figures = ours.recv() if answered else ("over time", f"stopped after {step.limit_s:g} s", {})
            child.join(_LEAVE_S if answered else 0)
        except EOFError:
            child.join()
            status, says, figures = "fail", f"its process ended with exit code {child.exitcode}", {}
        finally:
            _end(child)
    return StepResult(
        name=name,
        proves=step.proves,
        status=status,
        seconds=time.monotonic() - began,
        says=says,
        figures=figures,
    )


def _child(step: Step, device: str, folder: str, answer: Connection) -> None:
    os.setsid()  # with all that it starts it can be ended as one
    os.dup2(2, 1)  # whatever libraries print, stdout is the record's
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        found: Found = step.run(torch.device(device), Path(folder))
    except Exception as error:  # whatever it is, it is what the step found
        answer.send(("fail", first_line(error), {}))
    else:
        answer.send(("pass", found.says, found.figures))


def _end(child: BaseProcess) -> None:
    """End it, and all that it started."""
    assert child.pid is not None
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, or all have ended
        child.kill()
    child.join()

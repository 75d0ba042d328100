"""A small suite of two cases on two testbeds, and a stand-in for the program that makes their files in no time."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import Provenance, digest, load_record, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.solver.problem.plan import Plan
from tests.reports.report_examples import CONCURRENCY, OUTPUT, PROMPT, example_plan, example_profile, example_run

SUITE = f"""
name = "small"
[[testbed]]
name = "two"
file = "two.toml"
[[testbed]]
name = "inline"
node = [{{ name = "a", memory = "60MB" }}, {{ name = "b", memory = "60MB" }}]
network = {{ bandwidth = "10Mbit" }}
[[workload]]
name = "chat"
prompt_tokens = {PROMPT}
output_tokens = {OUTPUT}
concurrency = {CONCURRENCY}
requests = 48
[[case]]
testbed = "two"
workload = "chat"
[[case]]
testbed = "inline"
workload = "chat"
name = "full"
concurrency = "kv-full"
"""
TESTBED = '[[node]]\nname = "big"\nmemory = "100MB"\n'


def write_suite(folder: Path, text: str = SUITE) -> Path:
    """The suite's file, with the testbed that it names beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "two.toml").write_text(TESTBED)
    (folder / "suite.toml").write_text(text)
    return folder / "suite.toml"


class StandIn:
    """Runs command lines as ``run_child`` does, and notes them; every run log is one of ``example_run``.

    ``speeds`` are of the runs, in turn; ``exits`` maps the number of a call, from 0, to the exit code it ends with;
    ``stale`` is what the runs say of their profile.
    """

    def __init__(
        self, *, speeds: Sequence[float] = (1.0,), exits: dict[int, int] | None = None, stale: tuple[str, ...] = ()
    ) -> None:
        self.calls: list[tuple[str, ...]] = []
        self._stale = stale
        self._speeds, self._exits, self._runs = speeds, exits or {}, 0

    @property
    def commands(self) -> list[str]:
        """What was called, the command and what it made."""
        return [f"{call[0]} {made_by(call)}" for call in self.calls]

    def __call__(self, arguments: Sequence[str], *, stdout: Any, stderr: Any) -> int:
        number = len(self.calls)
        self.calls.append(tuple(arguments))
        if number in self._exits:
            stderr.write(b"helixbench: it broke\n")
            return self._exits[number]
        speed = self._speeds[self._runs % len(self._speeds)]
        self._runs += arguments[0] == "bench"
        make_record(list(arguments), speed=speed, seed=self._runs, stale=self._stale)
        return 0


def made_by(call: Sequence[str]) -> str:
    """The file or folder that a command line makes, without the folder of results."""
    made = call[2] if call[0] == "model" else call[list(call).index("-o") + 1]
    return "/".join(Path(made).parts[-2:])


def make_record(arguments: list[str], *, speed: float, seed: int, stale: tuple[str, ...] = ()) -> None:
    """What the command would write, as far as ``validate`` reads it."""
    command = shlex.join(["helixbench.py", *arguments])
    if arguments[0] == "model":
        Path(arguments[2]).mkdir(parents=True)
        return
    out = Path(arguments[arguments.index("-o") + 1])
    made: ClusterProfile | Plan | RunLog
    if arguments[0] == "profile":
        note = str(time.monotonic_ns())  # no two measurements agree to the last digit
        made = replace(example_profile(), provenance=Provenance(note=note))
    elif arguments[0] == "solve":
        made = replace(example_plan(), cluster_digest=digest(load_record(Path(arguments[1]), ClusterProfile)))
    else:
        plan = load_record(Path(arguments[1]), Plan)
        seed += 1000 * (arguments[0] == "simulate")
        made = replace(
            example_run(speed=speed, seed=seed),
            plan=plan,
            stale=stale,
            provenance=Provenance(inputs={"plan": digest(plan)}),
        )
    if arguments[0] == "simulate":  # such a record is the same whoever asks for it, and so names no command
        command = ""
    save_record(out, replace(made, provenance=replace(made.provenance, command=command)))
